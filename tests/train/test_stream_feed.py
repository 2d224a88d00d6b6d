"""Training on a stream: the same run, uninterrupted and resumed; packing; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamafactory.compose import resolve_config
from llamafactory.train.tuner import run_exp


def losses(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def test_a_resumed_stream_goes_on_with_the_rows_of_an_uninterrupted_run(train_config, tmp_path):
    options = {"streaming": True, "buffer_size": 4, "max_steps": 4, "logging_steps": 1, "save_steps": 2, "val_size": 2}
    whole = run_exp(train_config(output_dir=str(tmp_path / "whole"), **options)).output_dir
    broken = run_exp(train_config(output_dir=str(tmp_path / "broken"), **options)).output_dir
    record = json.loads((broken / "checkpoint-2" / "trainer_state.json").read_text())
    assert record["data"]["row"] == 2 * record["data"]["rows_per_window"]
    assert record["data"]["drawn"] == {"rows": record["data"]["row"]}  # the realised mix
    resumed = run_exp(
        train_config(
            output_dir=str(tmp_path / "broken"), resume_from_checkpoint=str(broken / "checkpoint-2"), **options
        )
    ).output_dir
    assert losses(resumed) == losses(whole)
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_bins_of_a_stream_hold_about_the_batch_size(train_config, tmp_path, capsys):
    options = {"streaming": True, "buffer_size": 4, "max_steps": 1, "packing": True, "cutoff_len": 128}
    result = run_exp(train_config(output_dir=str(tmp_path / "packed"), **options))
    assert result.exit_code == 0
    assert "rows fill a bin of 128 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "max_steps"),
        ({"max_steps": 3, "val_size": 0.5}, "val_size"),
        ({"max_steps": 3, "stage": "kto"}, "streaming"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(train_config, options, key):
    given = train_config(max_steps=1).flat() | {"streaming": True, "max_steps": -1} | options
    problems = resolve_config({name: value for name, value in given.items() if value is not None}).problems
    assert key in {problem.key for problem in problems}
