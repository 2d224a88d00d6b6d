"""The log of a run: whole rows, bounded size, and no fault of it stops training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory.train import log as run_log
from llamafactory.train.log import LOG_FILE, OLDER_LOG_FILE, RunLog, thinned
from llamafactory.train.run_index import read_log


def make(folder: Path, **changes: Any) -> RunLog:
    options: dict[str, Any] = {"total_steps": 100, "done_steps": 0, "history": [], "bar": False}
    return RunLog(folder, **options | changes)


def test_a_row_has_the_compatible_names(tmp_path: Path) -> None:
    make(tmp_path).write(5, 0.25, {"loss": 1.5, "grad_norm": None})
    [row] = read_log(tmp_path)
    assert row == {
        "current_steps": 5, "total_steps": 100, "loss": 1.5, "epoch": 0.25, "percentage": 5.0,
        "elapsed_time": "0:00:00", "remaining_time": "0:00:00",
    }  # fmt: skip


def test_a_torn_last_line_is_left_out_and_a_resumed_log_goes_on_behind_its_checkpoint(tmp_path: Path) -> None:
    log = make(tmp_path)
    for step in range(1, 6):
        log.write(step, 0.1, {"loss": float(step)})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"current_steps": 6, "lo')
    assert [row["current_steps"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    again = make(tmp_path, done_steps=3, history=log.history[:3])
    again.write(4, 0.1, {"loss": 4.0})
    assert [row["current_steps"] for row in read_log(tmp_path)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines())


def test_a_long_log_is_put_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MOST_BYTES", 2000)
    log = make(tmp_path)
    for step in range(1, 101):
        log.write(step, 0.1, {"loss": 1.0})
    sizes = [(tmp_path / name).stat().st_size for name in (LOG_FILE, OLDER_LOG_FILE)]
    assert max(sizes) < 2300
    assert read_log(tmp_path)[-1]["current_steps"] == 100
    make(tmp_path, done_steps=100, history=log.history)
    assert not (tmp_path / OLDER_LOG_FILE).exists()
    assert len(read_log(tmp_path)) == 100


def test_a_long_history_keeps_its_evaluations_and_its_newer_half(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_log, "MOST_ROWS", 40)
    log = make(tmp_path)
    for step in range(1, 401):
        log.write(step, 0.1, {"loss": 1.0} if step % 20 else {"eval_loss": 1.0})
    steps = [row["current_steps"] for row in log.history]
    assert len(steps) <= 40
    assert steps == sorted(steps)
    assert steps[-15:] == list(range(386, 401))
    assert sum("eval_loss" in row for row in log.history) == 20
    assert len(read_log(tmp_path)) == 400


def test_thinning_takes_every_second_row_of_training() -> None:
    rows = [{"loss": 1.0, "step": step} for step in range(8)]
    assert [row["step"] for row in thinned(rows)] == [1, 3, 4, 5, 6, 7]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOG_FILE).mkdir()
    log = make(tmp_path)
    for step in (1, 2):
        log.write(step, 0.1, {"loss": 1.0})
    assert capsys.readouterr().err.count("cannot be written") == 1
    make(tmp_path, done_steps=2, history=log.history)  # nor does a resume fail
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOG_FILE]
    assert len(log.history) == 2


def test_a_tracker_that_fails_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tracker(row: dict[str, Any], step: int) -> None:
        raise ConnectionError("no network")

    log = make(tmp_path, tracker=tracker)
    log.write(1, 0.1, {"loss": 1.0})
    assert "the tracker failed (ConnectionError: no network)" in capsys.readouterr().err
    assert len(read_log(tmp_path)) == 1
