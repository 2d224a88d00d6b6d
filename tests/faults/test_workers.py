"""A run is one process: there is no data worker that could die, or be left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.faults.harness import PATIENCE, Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def children(pid: int) -> set[int]:
    """Processes that any thread of a process has begun and that are still there."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= set(map(int, file.read_text().split()))
        except OSError:  # the thread has ended
            continue
    return found


def watched(run: Run, seconds: float) -> tuple[set[int], int]:
    """Children that were seen until the run ended or the time was over, and how often it was looked."""
    seen, looks, until = set[int](), 0, time.monotonic() + seconds
    while time.monotonic() < until and run.poll() is None:
        seen |= children(run.pid)
        looks += 1
        time.sleep(0.002)
    return seen, looks


def test_children_are_seen_where_there_are_any():
    before = children(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        assert children(os.getpid()) - before == {child.pid}
        child.kill()


def test_neither_tokenising_nor_training_has_child_processes(make_place):
    place = make_place(
        preprocessing_num_workers="4", dataloader_num_workers="4", save_steps="2", val_size="2", eval_strategy="steps",
        eval_steps="2", overwrite_cache="true",
    )  # fmt: skip
    run = place.begin("alone", fault="data:1:sleep=0.5,step:1:sleep=0.5")
    run.wait_for("failpoint data:1:sleep=0.5\n")
    tokenising, looks = watched(run, 0.4)
    assert (tokenising, looks > 5) == (set(), True)
    run.wait_for("failpoint step:1:sleep=0.5\n")
    training, looks = watched(run, PATIENCE)  # steps, evaluations, saves, the end
    assert (training, looks > 9) == (set(), True)
    assert run.wait() == 0, run.text[-2000:]
    for key in ("preprocessing_num_workers", "dataloader_num_workers"):
        assert key in run.text  # said to be without effect
