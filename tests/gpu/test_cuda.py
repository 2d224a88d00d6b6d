"""What only a CUDA device can show: mixed precision, the flat layout on the device, and a resumed run."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}, {"pure_bf16": True}, {}])
def test_a_run_on_the_device_learns(train_config, precision):
    from llamafactory.train.tuner import run_exp

    cfg = train_config(
        finetuning_type="full", num_train_epochs=5, lr_scheduler_type="constant", learning_rate=3e-3, **precision
    )
    folder = run_exp(cfg).output_dir
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((folder / "run.json").read_text())["plan"]["device"] == "cuda"


def test_flat_rows_on_the_device_equal_rows_alone(tiny_config, make_examples):
    from transformers import AutoModelForCausalLM

    from llamafactory.data.collate import collate_flat
    from llamafactory.model import attention
    from llamafactory.train.logprob import hidden_states

    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    model = model.cuda().eval()
    examples = make_examples((7, 1, 23, 7))
    flat = hidden_states(model, collate_flat(examples).to("cuda"))[0].split((7, 1, 23, 7))
    for example, piece in zip(examples, flat, strict=True):
        alone = hidden_states(model, collate_flat([example]).to("cuda"))[0]
        torch.testing.assert_close(piece, alone, rtol=1e-4, atol=1e-4)
