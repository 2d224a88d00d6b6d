"""The rehearsal leaves no trace, and an out-of-memory says what to change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamafactory.extras.errors import ConfigError, LlamaFactoryError
from llamafactory.model import plan as plans
from llamafactory.train import loop, memory_use, rehearsal
from llamafactory.train.tuner import run_exp


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def test_a_rehearsed_run_has_the_same_numbers(train_config, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 3, "lora_dropout": 0.3}
    plain = run_exp(train_config(**options, output_dir=str(tmp_path / "plain"))).output_dir
    assert "rehearsal" not in capsys.readouterr().err
    monkeypatch.setattr(rehearsal, "ROOMY_SHARE", 0.0)
    rehearsed = run_exp(train_config(**options, output_dir=str(tmp_path / "rehearsed"))).output_dir
    assert "rehearsal: the longest micro-batch" in capsys.readouterr().err
    assert losses(rehearsed) == losses(plain)
    assert weights(rehearsed) == weights(plain)
    memory = json.loads((rehearsed / "run.json").read_text())["memory"]
    assert 0.5 < memory["planned"] / memory["used"] < 2


def test_an_out_of_memory_names_the_largest_part(train_config, monkeypatch):
    def failing(run, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop._Run, "train_step", failing)
    cfg = train_config(max_steps=1)
    with pytest.raises(
        LlamaFactoryError, match=r"(?s)not enough for this run: CUDA out of memory.*By the forecast.*plan CONFIG"
    ):
        run_exp(cfg)
    record = json.loads((Path(cfg.train.output_dir) / "run.json").read_text())
    assert record["state"] == "failed"
    assert "not enough for this run" in record["error"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), True), (torch.OutOfMemoryError("x"), True), (RuntimeError("a shape is wrong"), False),
     (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True)],
)  # fmt: skip
def test_out_of_memory_errors_are_told_apart(error, expected):
    assert memory_use.is_out_of_memory(error) is expected


def test_a_run_that_cannot_fit_stops_before_the_weights_are_loaded(train_config, monkeypatch):
    from llamafactory.train import build

    monkeypatch.setattr(plans, "room_of", lambda hardware, process_bytes: 1000)
    loaded: list[bool] = []
    monkeypatch.setattr(build, "load_model", lambda *args, **kwargs: loaded.append(True))
    with pytest.raises(ConfigError, match=r"(?s)the run needs .* GB.*largest part: .*1\. .* GB.*ignore_plan=true"):
        run_exp(train_config(max_steps=1))
    assert not loaded
    monkeypatch.undo()
    monkeypatch.setattr(plans, "room_of", lambda hardware, process_bytes: 1000)
    assert run_exp(train_config(max_steps=1, ignore_plan=True)).exit_code == 0


def test_the_plan_of_the_continued_run_keeps_its_split(train_config, tiny_config):
    from llamafactory.extras.hardware import read_hardware
    from llamafactory.model.plan import plan_training
    from llamafactory.train.planning import keep_split

    plan = plan_training(train_config(), tiny_config(), read_hardware(use_cpu=True))
    assert keep_split(plan, None) is plan
    kept = keep_split(plan, {"plan": {"micro_batch_tokens": 64}})
    assert kept == replace(plan, micro_batch_tokens=64, reasons=kept.reasons)
    assert "continued" in kept.reasons["micro_batch_tokens"]
