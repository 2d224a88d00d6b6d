"""A model that was changed is noticed, one that was only copied is not, and little is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamafactory.model.fingerprint import block_starts, fingerprint

BLOCK = 64 * 1024


def model(folder: Path, *, rows: int = 4) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    for number in range(2):
        save_file(
            {"weight": torch.randn(rows, 50_000), "bias": torch.randn(9)}, folder / f"model-{number}.safetensors"
        )
    (folder / "config.json").write_text("{}")
    return folder


def test_a_copy_elsewhere_is_the_same_model(tmp_path):
    one = model(tmp_path / "one")
    shutil.copytree(one, tmp_path / "ü b")
    (tmp_path / "ü b" / "config.json").write_text('{"transformers_version": "9"}')
    for path in (tmp_path / "ü b").iterdir():
        os.utime(path, (1, 1))
    assert fingerprint([one]) == fingerprint([tmp_path / "ü b"])


@pytest.mark.parametrize("change", ["step", "renamed", "gone", "more", "shape", "last byte", "adapter", "order"])
@pytest.mark.parametrize("rows", [4, 40])  # 0.8 MB is read whole, of 8 MB a part
def test_another_model_is_another(tmp_path, change, rows):
    folder = model(tmp_path / "model", rows=rows)
    adapter = model(tmp_path / "adapter")
    before, folders, path = fingerprint([folder]), [folder], folder / "model-1.safetensors"
    if change == "step":  # of training, as small as one may be
        save_file({name: tensor * (1 + 1e-6) for name, tensor in load_file(path).items()}, path)
    elif change == "renamed":
        path.rename(folder / "model-2.safetensors")
    elif change == "gone":
        path.unlink()
    elif change == "more":
        shutil.copy(path, folder / "model-3.safetensors")
    elif change == "shape":
        save_file({"weight": load_file(path)["weight"].T.contiguous(), "bias": load_file(path)["bias"]}, path)
    elif change == "last byte":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change == "adapter":
        folders.append(adapter)
    else:
        before, folders = fingerprint([folder, adapter]), [adapter, folder]
        if rows == 4:  # then both folders hold the same
            assert fingerprint(folders) == before
            return
    assert fingerprint(folders) != before


@given(size=st.integers(0, 200 * BLOCK) | st.integers(0, 10**12))
def test_the_ends_are_read_and_no_more_than_four_mebibytes(size):
    starts = block_starts(size)
    assert starts == sorted(set(starts))
    assert len(starts) <= 64
    assert size == 0 or (starts[0] == 0 and starts[-1] < size <= starts[-1] + BLOCK)
    if size <= 64 * BLOCK:
        assert all(later - earlier == BLOCK for earlier, later in zip(starts, starts[1:], strict=False))


def test_a_model_on_a_hub_counts_by_its_name(tmp_path):
    assert fingerprint([Path("org/one")]) != fingerprint([Path("org/two")])
