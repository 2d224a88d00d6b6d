"""A reward model from rows to a classifier that plain transformers loads and batches."""

from __future__ import annotations

import json

import torch

from llamafactory.compose import load_config
from llamafactory.export import export_and_verify
from llamafactory.model.valuehead import FILE
from llamafactory.train.tuner import run_exp


def test_a_reward_model_becomes_a_standard_classifier(tiny_model_dir, repo_dir, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = {
        "model_name_or_path": str(tiny_model_dir), "stage": "rm", "do_train": True, "dataset": "preference_pairs",
        "dataset_dir": str(repo_dir / "data"), "template": "chatml", "max_samples": 8, "max_steps": 2,
        "per_device_train_batch_size": 4, "save_steps": 1, "output_dir": str(tmp_path / "rm"), "learning_rate": 1e-2,
    }  # fmt: skip
    assert run_exp(load_config(words)).exit_code == 0
    for folder in (tmp_path / "rm", tmp_path / "rm" / "checkpoint-1"):
        assert (folder / FILE).is_file()
        assert (folder / "adapter_model.safetensors").is_file()
    merged = {
        "model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(tmp_path / "rm"), "template": "chatml",
        "export_dir": str(tmp_path / "merged"), "infer_dtype": "float32",
    }  # fmt: skip
    proof = export_and_verify(load_config(merged, command="export"))
    assert proof.passed
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = ["A long answer to a question.<|im_end|>", "No.<|im_end|>"]
    with torch.no_grad():
        together = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
        alone = torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
