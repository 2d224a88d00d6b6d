"""Signals in every phase, closed terminals, two runs in one folder: the exit code tells the truth, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from tests.faults.cells import CELLS
from tests.faults.harness import Outcome, Place

from llamafactory.train.checkpoint.folders import list_checkpoints
from llamafactory.train.checkpoint.manifest import find_fault

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
EVALUATED = CELLS["sft lora evaluated, best kept"] | {"save_total_limit": "9"}
PHASES = {
    "tokenising": "data:1:sleep=4",
    "first step": "step:1:sleep=4",
    "later step": "step:5:sleep=1",
    "evaluation": "eval:2:sleep=1",
    "save": "save.file:16:sleep=1",
}


@pytest.fixture
def place(make_place) -> Place:
    return make_place(**EVALUATED, gradient_accumulation_steps="2", lora_dropout="0.2")


@pytest.fixture
def reference(place: Place) -> Outcome:
    return place.finish("reference")


def stop_and_continue(place: Place, reference: Outcome, name: str, number: signal.Signals, run) -> None:
    run.send(number)
    code = run.wait(30)
    folder = place.folder / name
    if code != 0:  # the signal came before the end
        assert code == CODES[number], run.text[-3000:]
        assert run.last_line.startswith(f"stopped by {number.name} "), run.last_line
        assert all(find_fault(path) is None for path in list_checkpoints(folder))
        if "saved in" in run.last_line:
            assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
        code = place.begin(name).wait()
    assert code == 0
    assert place.outcome(name) == reference


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(place, reference, phase):
    number = random.Random(phase).choice(sorted(CODES))
    cold = ["overwrite_cache=true"] if phase == "tokenising" else []  # the reference run made the tokens
    run = place.begin(phase, *cold, fault=PHASES[phase])
    assert run.poll(0.6 if phase in ("tokenising", "first step") else 0.9) is None, "the run never came to the place"
    stop_and_continue(place, reference, phase, signal.Signals(number), run)


def at_random(place: Place, reference: Outcome, count: int, seed: int) -> None:
    started = time.monotonic()
    place.finish("timed")
    span = time.monotonic() - started
    rng = random.Random(seed)
    for number in range(count):
        run = place.begin(f"stopped-{number}")
        run.poll(rng.uniform(0.15, span))
        if run.poll() is None:
            stop_and_continue(place, reference, f"stopped-{number}", rng.choice(list(CODES)), run)


def test_a_signal_at_any_moment(place, reference):
    at_random(place, reference, 4, seed=1)


@pytest.mark.long
def test_a_signal_at_twenty_moments(place, reference):
    at_random(place, reference, 20, seed=2)


def test_a_second_signal_stops_at_once_and_harms_nothing(place, reference):
    run = place.begin("twice", fault="save.file:16:sleep=20")
    run.wait_for("step 3/")
    run.send(signal.SIGTERM)
    run.wait_for("saving, then stopping")
    started = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert time.monotonic() - started < 5
    assert run.last_line == "stopped at once by a second SIGTERM: nothing was saved"
    assert place.finish("twice") == reference


def test_a_step_that_never_ends_gives_up_after_save_grace(place):
    run = place.begin("stuck", "save_grace=1", fault="step:4:sleep=60")
    run.wait_for("step 3/")
    run.poll(0.2)
    run.send(signal.SIGTERM)
    assert run.wait(20) == 74
    assert "no save within save_grace (1 s)" in run.last_line
    assert "failpoints.py" in run.text  # the stack says where it hung
    assert place.begin("stuck").wait() == 0


def test_a_hangup_does_not_stop_a_run(place, reference):
    run = place.begin("hangup", fault="step:3:sleep=0.5")
    run.wait_for("step 2/")
    run.send(signal.SIGHUP)
    assert run.wait() == 0
    assert place.outcome("hangup") == reference


def test_a_closed_terminal_does_not_stop_a_run(place, reference):
    assert place.begin("closed", closed_stderr=True).wait() == 0
    assert place.outcome("closed") == reference


def test_a_second_run_is_kept_out_and_a_stale_lock_is_taken_over(place, reference):
    first = place.begin("shared", fault="step:3:sleep=60")
    first.wait_for("step 2/")
    second = place.begin("shared")
    assert second.wait() == 2
    assert f"another run is using this folder: pid {first.pid} on " in second.text
    assert first.kill()
    third = place.begin("shared")
    assert third.wait() == 0, third.text[-2000:]
    assert f"left over from pid {first.pid}" in third.text
    assert place.outcome("shared") == reference
    assert not (place.folder / "shared" / "run.lock").exists()


def test_a_fresh_lock_of_another_machine_is_respected(make_place):
    place = make_place()
    folder = place.folder / "remote"
    folder.mkdir()
    lock = folder / "run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "boot_id": "x", "started": "today"}))
    run = place.begin("remote")
    run.wait_for("waiting for a sign of life")
    os.utime(lock)
    assert run.wait() == 2
    assert "another run is using this folder: pid 1 on elsewhere, started today" in run.text
    os.utime(lock, (1, 1))
    assert place.begin("remote").wait() == 0
