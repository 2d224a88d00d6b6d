"""Stage ppo, from configuration to weights, on a tiny model with a reward that it can learn in seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llamafactory.extras import failpoints
from llamafactory.extras.errors import ConfigError
from llamafactory.train import rl
from llamafactory.train.experience import Experience
from llamafactory.train.rollout_rules import Played
from llamafactory.train.stages import ppo
from llamafactory.train.tuner import run_exp

REWARD = """
def even(completion_ids):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture
def run(train_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "rewards.py").write_text(REWARD, encoding="utf-8")

    def start(**changes: Any) -> list[dict[str, Any]]:
        options = {
            "stage": "ppo", "finetuning_type": "lora", "max_new_tokens": 6, "max_steps": 5, "ppo_epochs": 2,
            "reward_functions": [f"{tmp_path}/rewards.py:even"], "lr_scheduler_type": "constant",
            "save_strategy": "no", "ppo_buffer_size": 2,
        }  # fmt: skip
        run_exp(train_config(**(options | changes)))
        text = (tmp_path / "out" / "trainer_log.jsonl").read_text(encoding="utf-8")
        return [row for row in map(json.loads, text.splitlines()) if "loss" in row]

    return start


def test_without_a_learning_rate_nothing_drifts(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = run(learning_rate=1e-20, ppo_score_norm=True, ppo_whiten_rewards=True, temperature=0.8)
    for row in rows:
        assert row["ratio_off"] < 1e-3
        assert row["clipped"] == 0
        assert row["logp_gap/mean"] <= row["logp_gap/max"] < 1e-4
        assert row["logp_gap/p95"] <= row["logp_gap/max"]
    assert [row.get("kl") for row in rows] == [0.0, None, None, None, 0.0]
    assert rows[-1]["kl_coefficient"] < rows[0]["kl_coefficient"] == 0.2  # the KL is below its target
    assert (tmp_path / "out" / "value_head.safetensors").is_file()


def test_a_verifiable_reward_rises(run: Callable[..., Any]) -> None:
    rows = run(
        finetuning_type="full", max_steps=21, ppo_epochs=4, ppo_buffer_size=1, per_device_train_batch_size=20,
        top_k=16, ppo_kl_coefficient=0.0,
    )  # fmt: skip
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.85


def test_rewards_that_are_all_equal_are_said(run: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    run(reward_functions=["length:9"], max_steps=1)
    assert "rollout 0: all answers earn the same (1)" in capfd.readouterr().err


def test_a_resumed_run_is_the_same_run(run: Callable[..., Any], tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "ppo_score_norm": True}  # within the first rollout
    whole = run(**options)
    target = tmp_path / "out"
    before = load_file(target / "adapter_model.safetensors") | load_file(target / "value_head.safetensors")
    (target / "last").unlink(missing_ok=True)
    shutil.rmtree(target / "checkpoint-5")
    record = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
    again = run(**options)
    after = load_file(target / "adapter_model.safetensors") | load_file(target / "value_head.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for old, new in zip(whole, again, strict=True):
        assert [old.get(key) for key in ("loss", "kl", "kl_coefficient")] == [
            new.get(key) for key in ("loss", "kl", "kl_coefficient")
        ]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("step", [4, 5])
def test_a_run_that_is_stopped_within_an_update_is_the_same_run(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A rollout has four updates: the last one needs its rollout once more, and the fifth is played once more."""
    options = {"ppo_score_norm": True}
    whole = run(**options)
    shutil.rmtree(tmp_path / "out")
    visits: Counter[str] = Counter()

    def visit(name: str) -> bool:
        visits[name] += 1
        if name == "micro" and visits["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "visit", visit)
        run(**options)
    assert (tmp_path / "out" / f"checkpoint-{step - 1}").is_dir()
    again = run(**options)
    keys = ("loss", "kl", "kl_coefficient")
    assert [[row.get(key) for key in keys] for row in again] == [[row.get(key) for key in keys] for row in whole]


def test_advantages_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    made = [
        Experience(
            place=place, row=place, prompt=np.array([1], np.int32), answers=(np.arange(length, dtype=np.int32),),
            weights=np.ones(1, np.float32),
            **{name: rng.normal(size=length).astype(np.float32) for name in ("sampler", "old", "reference", "values")},
        )
        for place, length in enumerate((3, 5, 2))
    ]  # fmt: skip
    played = Played(
        rewards=np.array([[1.0], [0.5], [-1.0]]), lengths=np.array([[3], [5], [2]]), stopped=np.ones((3, 1), bool),
        limit=9,
    )  # fmt: skip
    state = {"kl_coefficient": 0.3, "scores": [0.0, 0.0, 0.0]}
    judged = ppo.judge(ppo.Options(), played, made, state, lambda tensor: tensor)
    raw = []
    for one, score in zip(made, (1.0, 0.5, -1.0), strict=True):
        rewards = [-0.3 * float(a - b) for a, b in zip(one.old, one.reference, strict=True)]
        rewards[-1] += score
        later, following = 0.0, 0.0
        found = []
        for reward, value in zip(reversed(rewards), reversed(one.values.tolist()), strict=True):
            later = reward + following - value + 0.95 * later
            following = value
            found.insert(0, later)
        raw.append(np.array(found))
    every = torch.tensor(np.concatenate(raw))
    expected = rl.whiten(every, rl.moments(every)).split([3, 5, 2])
    for one, advantages, own, before in zip(judged.experiences, expected, raw, made, strict=True):
        assert np.allclose(one.advantages, advantages.numpy(), atol=1e-5)
        assert np.allclose(one.returns, own + before.values, atol=1e-5)
    kl = sum(float(np.subtract(one.old, one.reference).sum()) for one in made if one.old is not None) / 3
    assert float(judged.metrics["kl"][0]) == pytest.approx(kl, abs=1e-6)


def test_without_something_that_scores_there_is_one_clear_error(run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="reward_model: stage ppo needs something that scores answers"):
        run(reward_functions=[])
