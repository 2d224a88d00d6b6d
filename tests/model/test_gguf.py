"""The GGUF reader against the `gguf` package, and against damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.gguf import read_gguf, read_tensor


def test_tensors_equal_those_of_the_reference_reader(tiny_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = read_gguf(tiny_gguf)
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    assert set(source.tensors) == set(reference)
    assert {entry.type_name for entry in source.tensors.values()} == {"F32", "F16", "Q4_1", "Q8_0"}
    for name, entry in source.tensors.items():
        expected = gguf.quants.dequantize(reference[name].data, reference[name].tensor_type)
        values = read_tensor(source, name)
        assert values.shape == entry.shape
        np.testing.assert_array_equal(values, expected.reshape(entry.shape), err_msg=name)


def test_metadata_has_python_values(tiny_gguf: Path) -> None:
    meta = read_gguf(tiny_gguf).metadata
    assert meta["general.architecture"] == "llama"
    assert meta["llama.block_count"] == 2
    assert meta["tokenizer.ggml.merges"] == ["Ċ Ċ", "h i"]
    assert meta["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(LlamaFactoryError, match="not a GGUF file"):
        read_gguf(path)


@pytest.mark.parametrize("kept", [5, 30, 200, 3000])
def test_a_header_cut_short_is_refused(tiny_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(LlamaFactoryError, match="damaged GGUF file at byte"):
        read_gguf(path)


def test_weights_cut_short_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(LlamaFactoryError, match=r"cut short inside tensor output_norm\.weight"):
        read_tensor(read_gguf(path), "output_norm.weight")
