"""Train -> plain peft -> export -> plain transformers -> chat, in clean processes on the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("llamafactory") for name in sys.modules)
base, adapter, prompt = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
plain = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, :200].tolist()
model = PeftModel.from_pretrained(model, adapter).eval()
logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, :200].tolist()
print(json.dumps([plain, logits]))
"""
PLAIN_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
logits = model(**tokenizer(sys.argv[2], return_tensors="pt")).logits[0, -1, :200].tolist()
messages = [{"role": "user", "content": "What is the capital of France?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
text = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1]:])
print(json.dumps([logits, text, type(model).__name__]))
"""
PROMPT = "Who are you? I am"


def clean_process(program: str, *words: str):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300, check=False,
        env=environment, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def our_logits(trained, embedded_model_dir):
    import torch
    from transformers import AutoTokenizer

    from llamafactory.compose import load_config
    from llamafactory.model.loader import adapter_folders, load_model
    from llamafactory.model.method import apply_method

    cfg = load_config(
        {"model_name_or_path": "SmolLM2-135M-Instruct", "adapter_name_or_path": str(trained)}, command="chat"
    )
    base = load_model(cfg.model, dtype="float32", attention="segments")
    model = apply_method(
        base, "lora", cfg.adapter_options, adapters=adapter_folders(cfg.model), trainable=False
    ).eval()
    ids = AutoTokenizer.from_pretrained(embedded_model_dir)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        return model(**ids).logits[0, -1, :200]


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(trained, our_logits, embedded_model_dir):
    import torch

    base, adapted = clean_process(PLAIN_PEFT, str(embedded_model_dir), str(trained), PROMPT)
    torch.testing.assert_close(torch.tensor(adapted), our_logits, rtol=1e-5, atol=1e-4)
    assert (torch.tensor(base) - our_logits).abs().max() > 0.1  # the adapter does something


@pytest.fixture(scope="module")
def exported(cli, trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "merged"
    done = cli(
        "export", "model_name_or_path=SmolLM2-135M-Instruct", f"adapter_name_or_path={trained}",
        f"export_dir={folder}", "infer_dtype=float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "max logit gap" in done.stderr
    return folder


def test_the_export_loads_in_plain_transformers_with_the_same_logits(exported, our_logits):
    import torch

    logits, answer, kind = clean_process(PLAIN_TRANSFORMERS, str(exported), PROMPT)
    assert kind == "LlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(logits), our_logits, rtol=1e-4, atol=2e-3)
    assert answer.strip()


def test_the_export_carries_its_proof_and_everything_a_server_needs(exported):
    proof = json.loads((exported / "export_proof.json").read_text())
    assert proof["passed"]
    assert 0 <= proof["max_gap"] <= 1e-3
    assert proof["adapter_effect"] > 0.1
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "Modelfile",
    }  # fmt: skip


def test_half_the_size_is_within_its_limit(cli, trained, tmp_path):
    done = cli(
        "export", "model_name_or_path=SmolLM2-135M-Instruct", f"adapter_name_or_path={trained}",
        f"export_dir={tmp_path / 'merged'}", "infer_dtype=bfloat16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    proof = json.loads((tmp_path / "merged" / "export_proof.json").read_text())
    assert proof["dtype"] == "bfloat16"
    assert 1e-3 < proof["max_gap"] < 1.0
    assert proof["top1_agreement"] > 0.95
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < 300e6


def test_a_gap_over_the_limit_is_an_error_and_never_takes_the_name(cli, trained, tmp_path):
    done = cli(
        "export", "model_name_or_path=SmolLM2-135M-Instruct", f"adapter_name_or_path={trained}",
        f"export_dir={tmp_path / 'merged'}", "infer_dtype=bfloat16", "export_max_logit_gap=1e-9",
    )  # fmt: skip
    assert done.returncode == 1
    assert "the exported model is not the trained one" in done.stderr
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged-rejected").is_dir()


def test_an_occupied_export_folder_is_not_touched(cli, trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = cli(
        "export", "model_name_or_path=SmolLM2-135M-Instruct", f"adapter_name_or_path={trained}",
        f"export_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "export_dir" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_chat_in_the_terminal(cli, trained):
    done = cli(
        "chat", "model_name_or_path=SmolLM2-135M-Instruct", f"adapter_name_or_path={trained}", "do_sample=false",
        "max_new_tokens=24", input="What is the capital of France?\nclear\nsystem You are terse.\nHi\nexit\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Assistant: ") == 2
    assert "Paris" in done.stdout
    assert "The dialogue is forgotten." in done.stdout
    assert "The system text is set" in done.stdout


def test_the_run_folder_tells_what_was_trained(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["config"]["data_variables"] == {"name": "Ada Löve", "author": "two people"}
    assert record["trainable_parameters"] == 2_442_240
    assert (trained / "training_loss.png").read_bytes().startswith(b"\x89PNG")
