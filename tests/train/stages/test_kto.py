"""A run of stage kto on a tiny model: what its log says in training and in evaluation."""

from __future__ import annotations

import json

import pytest

from llamafactory.compose import load_config
from llamafactory.train.tuner import run_exp


def test_margins_are_logged_where_a_step_has_answers_of_both_kinds(tiny_model_dir, repo_dir, tmp_path):
    options = {
        "model_name_or_path": str(tiny_model_dir), "stage": "kto", "do_train": True, "dataset": "kto_feedback",
        "dataset_dir": str(repo_dir / "data"), "template": "auto", "cutoff_len": 64, "max_samples": 22, "val_size": 6,
        "per_device_train_batch_size": 2, "max_steps": 8, "logging_steps": 1, "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "out"), "save_strategy": "no", "eval_strategy": "epoch",
    }  # fmt: skip
    assert run_exp(load_config(options)).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    seen = {True: 0, False: 0}
    for prefix, row in [(prefix, row) for row in rows for prefix in ("", "eval_") if f"{prefix}loss" in row]:
        sides = [row.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected")]
        margin = row.get(f"{prefix}rewards/margins")
        seen[None not in sides] += 1
        assert margin == (None if None in sides else pytest.approx(sides[0] - sides[1]))
    assert seen[True] >= 2
