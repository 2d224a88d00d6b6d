"""The parts of a start add up to the time until the first step is done."""

from __future__ import annotations

import json

import pytest

from llamafactory.train.start_up import StartUp
from llamafactory.train.tuner import run_exp


def test_parts_add_up_and_a_phase_may_come_twice():
    times = iter([10.0, 11.5, 14.0, 14.25])
    start = StartUp(clock=lambda: next(times))
    for phase in ("imports", "rows", "imports"):
        start.ended(phase)
    assert start.to_dict() == {"imports": 1.75, "rows": 2.5, "total": 4.25}
    assert start.line() == "first step done after 4.2 s: imports 1.8, rows 2.5"


def test_a_run_records_its_start_once(train_config, tmp_path, capsys):
    run_exp(train_config(max_steps=2))
    found = json.loads((tmp_path / "out" / "run.json").read_text())["start_up"]
    assert list(found) == ["imports", "rows", "plan", "model", "optimizer", "first step", "total"]
    assert found["total"] == pytest.approx(sum(found.values()) - found["total"], abs=0.01)
    assert found["first step"] > 0
    assert capsys.readouterr().err.count("first step done after") == 1
