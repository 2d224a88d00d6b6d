"""Loading: one clear message for each way to fail, and no pickled weights."""

from __future__ import annotations

import json

import pytest
import torch

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.hparams.model import ModelConfig
from llamafactory.model.loader import adapter_folders, load_model, load_model_config, load_tokenizer


def test_a_model_that_is_not_there(tmp_path):
    cfg = ModelConfig(model_name_or_path=str(tmp_path / "nothing"), offline=True)
    with pytest.raises(LlamaFactoryError, match=r"cannot load '.*nothing'.*\n.*a hub id that this machine can reach"):
        load_model_config(cfg)


def test_pickled_weights_are_never_loaded(tiny_model_dir, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    cfg = ModelConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(LlamaFactoryError, match="safetensors"):
        load_model(cfg, dtype="float32", attention="sdpa")


def test_an_adapter_needs_its_config_and_safe_weights(tmp_path):
    cfg = ModelConfig(adapter_name_or_path=str(tmp_path))
    with pytest.raises(LlamaFactoryError, match=r"holds no adapter_config\.json"):
        adapter_folders(cfg)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(LlamaFactoryError, match=r"no adapter_model\.safetensors\. Pickled weights"):
        adapter_folders(cfg)


def test_the_end_token_of_a_template_takes_the_place_of_the_tokenizers_own(tiny_model_dir):
    cfg = ModelConfig(model_name_or_path=str(tiny_model_dir))
    assert load_tokenizer(cfg).eos_token == "<|im_end|>"
    assert load_tokenizer(cfg, eos_token="<|endoftext|>").eos_token == "<|endoftext|>"


def test_a_missing_pad_token_becomes_the_end_token(tiny_model_dir, tmp_path):
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_training_from_scratch_reads_the_config_only(tiny_model_dir):
    cfg = ModelConfig(model_name_or_path=str(tiny_model_dir), train_from_scratch=True)
    stored = load_model(cfg.model_copy(update={"train_from_scratch": False}), dtype="float32", attention="sdpa")
    fresh = load_model(cfg, dtype="float32", attention="sdpa")
    ours, theirs = (next(iter(model.parameters())) for model in (fresh, stored))
    assert ours.shape == theirs.shape
    assert not ours.equal(theirs)
