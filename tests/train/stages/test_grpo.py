"""Stage grpo, from configuration to weights, on a tiny model with a reward that it can learn in seconds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamafactory.extras.errors import ConfigError
from llamafactory.train.rewards.functions import RewardUnavailableError
from llamafactory.train.stages import grpo
from llamafactory.train.tuner import run_exp

VARIANTS = list(grpo.VARIANTS)
REWARD = """
def even(completion_ids):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

def broken(completions):
    broken.calls = getattr(broken, "calls", 0) + 1
    return [1.0 / (broken.calls < 3) for _ in completions]
"""


@pytest.fixture
def run(train_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "rewards.py").write_text(REWARD, encoding="utf-8")

    def start(out: str = "out", **changes: Any) -> list[dict[str, Any]]:
        options = {
            "stage": "grpo", "finetuning_type": "full", "num_generations": 4, "max_new_tokens": 6, "max_steps": 2,
            "reward_functions": [f"{tmp_path}/rewards.py:even"], "output_dir": str(tmp_path / out),
            "lr_scheduler_type": "constant", "save_strategy": "no", "weight_decay": 0.0,
        }  # fmt: skip
        run_exp(train_config(**(options | changes)))
        text = (tmp_path / out / "trainer_log.jsonl").read_text(encoding="utf-8")
        return [row for row in map(json.loads, text.splitlines()) if "loss" in row]

    return start


@pytest.mark.parametrize("variant", ["grpo", pytest.param("rloo", marks=pytest.mark.long)])
def test_a_verifiable_reward_rises(run: Callable[..., Any], variant: str) -> None:
    rows = run(grpo_variant=variant, max_steps=6, num_generations=8, grpo_beta=0.0, top_k=16, log_completions=0)
    assert rows[0]["reward"] < 0.6
    assert rows[-1]["reward"] > 0.9
    assert rows[0]["entropy"] == pytest.approx(math.log(49152), rel=0.01)
    assert "rewards/even" in rows[0]


@pytest.mark.parametrize("variant", ["grpo", *(pytest.param(name, marks=pytest.mark.long) for name in VARIANTS[1:])])
def test_without_a_learning_rate_nothing_drifts(run: Callable[..., Any], variant: str, tmp_path: Path) -> None:
    rows = run(
        grpo_variant=variant, learning_rate=1e-20, grpo_epochs=2, grpo_buffer_size=2, max_steps=5, grpo_beta=0.1,
        temperature=0.7, top_k=5000, top_p=0.9, dynamic_sampling=1,
    )  # fmt: skip
    for row in rows:
        assert abs(row["ratio"] - 1) < 1e-3
        assert row["ratio_off"] < 1e-3
        assert row["clipped"] == 0
        assert row["logp_gap/mean"] <= row["logp_gap/max"] < 1e-4
        assert row["logp_gap/p95"] <= row["logp_gap/max"]
        assert row["logp_gap/over_0.1"] == 0
    assert all(abs(row["kl"]) < 1e-6 for row in rows if "kl" in row)
    assert ["reward" in row for row in rows] == [True, False, False, False, True]
    lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 4 + [4] * 4


def test_the_batch_may_be_split_in_any_way(run: Callable[..., Any], tmp_path: Path) -> None:
    options = {
        "max_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "finetuning_type": "full",
        "mask_truncated": False,
    }
    first = run("a", **options)
    second = run("b", **options, per_device_train_batch_size=1, gradient_accumulation_steps=4, flash_attn="disabled")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first[0]["reward"] == pytest.approx(second[0]["reward"], abs=1e-12)
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], abs=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=1e-4)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6


@pytest.mark.parametrize("cut", [2, 3])  # where a rollout begins, and within one
def test_a_resumed_run_is_the_same_run(run: Callable[..., Any], tmp_path: Path, cut: int) -> None:
    options = {"grpo_epochs": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": cut}
    whole = run("whole", **options)
    target = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", target, symlinks=True)
    (target / "last").unlink(missing_ok=True)
    record = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
    for path in target.glob("checkpoint-*"):
        if path.name != f"checkpoint-{cut}":
            shutil.rmtree(path)
    assert (target / f"checkpoint-{cut}" / "experience.safetensors").exists() == (cut == 3)
    assert not (target / "experience.safetensors").exists()  # only a resume needs it
    again = run("resumed", **options, allow_change=["output_dir"])
    for before, after in zip(whole, again, strict=True):
        for key in ("loss", "grad_norm", "ratio"):
            assert before[key] == after[key]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "resumed")]
    assert lines[0] == lines[1]


def test_a_reward_that_fails_stops_the_run_with_its_state_saved(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RewardUnavailableError, match="ZeroDivisionError") as caught:
        run(reward_functions=[f"{tmp_path}/rewards.py:broken"], max_steps=9, save_strategy="steps", save_steps=100)
    assert "prompt" in str(caught.value)
    assert [path.name for path in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-2"]


def test_faults_may_count_as_zero_and_are_reported(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = run(reward_functions=[f"{tmp_path}/rewards.py:broken", "length:9"], reward_errors="zero", max_steps=4)
    assert "rewards/broken/faults" in rows[-1]
    assert rows[-1]["reward"] == 1.0


def test_a_reward_sees_the_columns_of_the_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    code = "def known(prompts, instruction):\n    return [float(a in p) for a, p in zip(instruction, prompts)]\n"
    (tmp_path / "more.py").write_text(code, encoding="utf-8")
    rows = run(reward_functions=[f"{tmp_path}/more.py:known"], max_steps=1, val_size=4, do_eval=True)
    assert rows[0]["reward"] == 1.0
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_reward"] == 1.0
    (tmp_path / "more.py").write_text("def known(instructions):\n    return []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'instruction'"):
        run("again", reward_functions=[f"{tmp_path}/more.py:known"])


def test_gold_is_logged_and_never_a_reward(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = run(reward_functions=["length:9"], gold_function=f"{tmp_path}/rewards.py:even", val_size=4, do_eval=True)
    assert rows[0]["reward"] == 1.0
    assert 0 < rows[0]["gold/even"] < 1
    assert rows[0]["flat_groups"] == 1.0
    said = "all answers to 100% of the prompts earn the same"
    assert said in " ".join(json.loads((tmp_path / "out" / "run.json").read_text())["readings"])
    assert said in (tmp_path / "out" / "README.md").read_text().partition("## What the curves say")[2]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_reward"] == 1.0
    assert 0 < results["eval_gold/even"] < 1


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"reward_functions": []}, "needs something that scores answers"),
        ({"do_sample": False}, "teach nothing"),
        ({"repetition_penalty": 1.2}, "would not be those of the policy"),
        ({"reward_weights": [1, 2]}, "2 weights for 1 sources"),
        ({"reward_functions": ["no_such_check"]}, "neither a Python function nor a built-in check"),
        ({"dataset": None}, "no data set to train on"),
    ],
)
def test_what_is_wrong_is_said_at_once(run: Callable[..., Any], changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        run(**changes)
