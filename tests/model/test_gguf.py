"""What is read from a GGUF file, and what is said of a damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.gguf import read_gguf, read_tensor


def test_tensors_have_torch_shapes_and_dequantised_values(tiny_gguf: Path) -> None:
    source = read_gguf(tiny_gguf)
    weight = read_tensor(source, "blk.0.ffn_down.weight")
    assert weight.shape == (64, 96)
    assert weight.dtype == np.float32
    assert 0.8 < float(weight.std()) < 1.2  # written from a standard normal


def test_metadata_has_python_values(tiny_gguf: Path) -> None:
    meta = read_gguf(tiny_gguf).metadata
    assert meta["general.architecture"] == "llama"
    assert meta["llama.block_count"] == 2
    assert meta["tokenizer.ggml.merges"] == ["Ċ Ċ", "h i"]
    assert meta["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


@pytest.mark.parametrize("kept", [0, 5, 30, 200, 3000])
def test_a_file_cut_short_is_refused(tiny_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(LlamaFactoryError, match="not a GGUF file, or a damaged one"):
        read_gguf(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model at all" * 10)
    with pytest.raises(LlamaFactoryError, match="not a GGUF file"):
        read_gguf(path)


def test_weights_cut_short_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(LlamaFactoryError, match="damaged"):
        read_gguf(path)
