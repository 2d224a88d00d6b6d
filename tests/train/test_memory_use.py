"""The peak of memory that a run reports is its own, not that of what the process did before."""

from __future__ import annotations

import json
import sys

import pytest

from llamafactory.extras import hardware
from llamafactory.extras.hardware import read_process_memory
from llamafactory.train import memory_use
from llamafactory.train.memory_use import Peak, compare_line
from llamafactory.train.tuner import run_exp

MB = 1_000_000


def spend(num_bytes: int) -> int:
    """Takes memory and gives it back; the highest memory of this process with it."""
    block = bytearray(num_bytes)
    peak = read_process_memory()[0]
    del block
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_what_was_before_is_forgotten_and_what_comes_is_seen():
    before = spend(400 * MB)
    assert read_process_memory()[1] >= before - MB
    peak = Peak.begin()
    assert peak.before == 0
    assert peak.bytes_on("cpu") < before - 300 * MB
    after = spend(200 * MB)
    assert abs(peak.bytes_on("cpu") - after) < 20 * MB
    assert peak.bytes_on("tpu") == 0


def test_a_peak_that_cannot_be_forgotten_is_not_taken_for_that_of_the_run(monkeypatch):
    peaks = iter([9, 9, 9, 12])
    monkeypatch.setattr(memory_use, "forget_process_peak", lambda: next(peaks))
    monkeypatch.setattr(memory_use, "read_process_memory", lambda: (5, next(peaks)))
    peak = Peak.begin()
    assert [peak.bytes_on("cpu") for _ in range(3)] == [0, 0, 12]  # not known until it is higher than before


def test_where_nothing_can_be_forgotten_the_peak_so_far_is_returned(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "Path", lambda *parts: tmp_path / "not there" / "clear_refs")
    monkeypatch.setattr(hardware, "read_process_memory", lambda: (5, 7))
    assert hardware.forget_process_peak() == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_run_behind_other_work_reports_its_own_peak(train_config):
    before = spend(1500 * MB)
    result = run_exp(train_config(max_steps=1))
    memory = json.loads((result.output_dir / "run.json").read_text())["memory"]
    assert memory["used"] < before - 500 * MB
    assert result.summary.split("; in ")[0].endswith(compare_line(memory))
    assert f"used {memory['used'] / 1e9:.2f} GB" in result.summary
