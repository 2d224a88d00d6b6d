"""Signals in every phase, closed terminals, two runs in one folder: the exit code tells the truth, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tests.faults.cells import CELLS
from tests.faults.harness import Outcome, Place, Tally

from llamafactory.train.checkpoint.folders import list_checkpoints
from llamafactory.train.checkpoint.manifest import find_fault

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
EVALUATED = CELLS["sft lora evaluated, best kept"] | {"save_total_limit": "9"}
PHASES = {
    "tokenising": "data:1",
    "loading": "load:1",
    "first step": "step:1",
    "micro-batch": "micro:6",
    "later step": "step:5",
    "evaluation": "eval:2",
    "save": "save.file:16",
}
"""Where a run sleeps until the signal comes."""


@pytest.fixture
def place(make_place) -> Place:
    return make_place(**EVALUATED, gradient_accumulation_steps="2", lora_dropout="0.2")


@pytest.fixture
def reference(place: Place) -> Outcome:
    return place.finish("reference")


def stop_and_continue(place: Place, reference: Outcome, tally: Tally, name: str, number: signal.Signals, run) -> bool:
    """Stops a run, and continues it where the signal came before its end; whether it did."""
    if run.poll() is None:
        run.send(number)
    code = run.wait()
    folder = place.folder / name
    if code != 0:  # the signal came before the end
        assert code == CODES[number], run.text[-3000:]
        assert run.last_line.startswith(f"stopped by {number.name} "), run.last_line
        assert all(find_fault(path) is None for path in list_checkpoints(folder))
        if "saved in" in run.last_line:
            assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
        assert place.begin(name).wait() == 0
        tally.add_stop()
    assert place.outcome(name) == reference
    return code != 0


def signal_in(place: Place, reference: Outcome, tally: Tally, phase: str, name: str, delay: float) -> bool:
    """Stops a run in a phase, `delay` seconds after it came there, and continues it."""
    more = ["overwrite_cache=true"] if phase == "tokenising" else []  # the reference run made the tokens
    if phase == "loading":
        assert place.begin(name, "async_save=false", fault="step:4:kill").wait() == -signal.SIGKILL
    run = place.begin(name, *more, fault=f"{PHASES[phase]}:sleep=1")
    run.reach_fault()
    run.poll(delay)
    return stop_and_continue(place, reference, tally, name, random.Random(name).choice(sorted(CODES)), run)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(place, reference, tally, phase):
    assert signal_in(place, reference, tally, phase, phase, 0.1), "the run ended before it heard the signal"


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_signals_in_each_phase(place, reference, tally, phase, request):
    rng = random.Random(f"{phase} again")
    for number in range(request.config.getoption("--stops")):
        signal_in(place, reference, tally, phase, f"{phase} {number}", rng.uniform(0.0, 1.3))


@pytest.mark.long
def test_a_signal_while_answers_are_sampled(make_place, tally):
    place = make_place(**CELLS["grpo lora"])
    reference = place.finish("reference")
    for nth in (3, 40):
        run = place.begin(f"sampling {nth}", fault=f"sample:{nth}:sleep=1")
        run.reach_fault()
        assert stop_and_continue(place, reference, tally, f"sampling {nth}", signal.SIGTERM, run)


@pytest.mark.long
def test_a_signal_while_predictions_are_written(make_place, tally):
    more = {"do_predict": "true", "predict_with_generate": "true", "max_new_tokens": "6", "do_sample": "false",
            "val_size": "4", "per_device_eval_batch_size": "1"}  # fmt: skip
    place = make_place(**more)
    reference = place.finish("reference")
    written = (place.folder / "reference" / "generated_predictions.jsonl").read_bytes()
    run = place.begin("predicting", fault="predict:1:sleep=1")
    run.reach_fault()
    assert stop_and_continue(place, reference, tally, "predicting", signal.SIGTERM, run)
    assert (place.folder / "predicting" / "generated_predictions.jsonl").read_bytes() == written


def at_random(place: Place, reference: Outcome, tally: Tally, count: int, seed: int) -> None:
    started = time.monotonic()
    place.finish("timed")
    span = time.monotonic() - started
    rng = random.Random(seed)
    hits = 0
    for number in range(5 * count):
        run = place.begin(f"stopped-{number}")
        run.hear_signals()
        run.poll(rng.uniform(0.0, span))
        hits += stop_and_continue(place, reference, tally, f"stopped-{number}", rng.choice(list(CODES)), run)
        if hits == count:
            return
    raise AssertionError(f"{hits} of {count} signals came before the end of their run")


def test_a_signal_at_any_moment(place, reference, tally):
    at_random(place, reference, tally, 4, seed=1)


@pytest.mark.long
def test_a_signal_at_twenty_moments(place, reference, tally):
    at_random(place, reference, tally, 20, seed=2)


def test_a_second_signal_stops_at_once_and_harms_nothing(place, reference):
    run = place.begin("twice", fault="save.file:16:sleep=60")
    run.reach_fault()
    run.send(signal.SIGTERM)
    run.wait_for("saving, then stopping")
    started = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert time.monotonic() - started < 30  # the save sleeps for a minute
    assert run.last_line == "stopped at once by a second SIGTERM: nothing was saved"
    assert place.finish("twice") == reference


def test_a_step_that_never_ends_gives_up_after_save_grace(place):
    run = place.begin("stuck", "save_grace=1", fault="step:4:sleep=60")
    run.reach_fault()
    run.send(signal.SIGTERM)
    assert run.wait(50) == 74
    assert "no save within save_grace (1 s)" in run.last_line
    assert "failpoints.py" in run.text  # the stack says where it hung
    assert place.begin("stuck").wait() == 0


def test_a_hangup_does_not_stop_a_run(place, reference):
    run = place.begin("hangup", fault="step:3:sleep=0.5")
    run.reach_fault()
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


def lock_of_another_machine(place: Place, name: str) -> Path:
    (place.folder / name).mkdir()
    lock = place.folder / name / "run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "boot_id": "x", "started": "today"}))
    return lock


def test_a_fresh_lock_of_another_machine_is_respected(make_place):
    place = make_place()
    lock = lock_of_another_machine(place, "remote")
    run = place.begin("remote")
    run.wait_for("for a sign of life")
    os.utime(lock)
    assert run.wait() == 2
    assert "another run is using this folder: pid 1 on elsewhere, started today" in run.text


@pytest.mark.long
def test_a_silent_lock_of_another_machine_is_taken_over(make_place):
    place = make_place()
    os.utime(lock_of_another_machine(place, "remote"), (1, 1))
    run = place.begin("remote")
    assert run.wait() == 0
    assert "left over from pid 1 on elsewhere: taken over" in run.text
