"""Reinforcement learning makes the bundled model do something that it seldom did before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory.compose import load_config
from llamafactory.train.tuner import run_exp

TOPICS = ("cats", "rain", "bread", "music", "the moon", "trees", "tea", "winter")
JSON, YES = "Write a JSON object with the key name for {}.", "Answer yes or no. Is {} good?"
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": (
        JSON,
        {"template": "auto", "reward_functions": [r"regex:^\s*\{"], "per_device_train_batch_size": 8,
         "num_generations": 6, "grpo_beta": 0.0, "max_steps": 4, "max_new_tokens": 3},
    ),
    "ppo": (
        YES,
        {"template": "chatml", "reward_functions": [r"regex:^\s*Yes\b"], "per_device_train_batch_size": 48,
         "ppo_epochs": 4, "ppo_kl_coefficient": 0.0, "max_steps": 21, "max_new_tokens": 2},
    ),
}  # fmt: skip
"""Prompt and options: grpo learns to begin with JSON, ppo to begin with Yes. Each within 3 minutes of two cores."""


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_verifiable_reward_rises(stage: str, embedded_model_dir: Path, tmp_path: Path) -> None:
    asked, options = STAGES[stage]
    rows = [{"instruction": asked.format(topic), "output": ""} for topic in TOPICS]
    copies = options["per_device_train_batch_size"] // len(TOPICS)
    (tmp_path / "rows.json").write_text(json.dumps(rows * copies))
    entry = {"file_name": "rows.json", "columns": {"prompt": "instruction"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    shared = {
        "model_name_or_path": str(embedded_model_dir), "dataset": "rows", "dataset_dir": str(tmp_path),
        "do_train": True, "output_dir": str(tmp_path / "out"), "stage": stage,
        "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "log_completions": 0,
    }  # fmt: skip
    run_exp(load_config(shared | options))
    log = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in log if "reward" in row]
    assert rewards[0] <= (0.35 if stage == "grpo" else 0.3)
    assert sum(rewards[-2:]) / 2 >= 0.8
