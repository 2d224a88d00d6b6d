"""Kills inside a save, damaged checkpoints, full disks: an older checkpoint is used; nothing is loaded unverified."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from tests.faults.harness import Outcome, Place

from llamafactory.train.checkpoint.folders import list_checkpoints
from llamafactory.train.checkpoint.manifest import find_fault

NUM_FILES = 9
"""Files of a checkpoint of this model; a test compares it with a real one."""
VISITS = NUM_FILES - 1 + 3
"""Visits of the failpoint `save.file` in one save: three while files are written, then one before each fsync."""
IN_A_SAVE = [f"save.file:{VISITS + nth}:kill" for nth in range(1, VISITS + 1)] + [
    f"save.{moment}:2:kill" for moment in ("start", "manifest", "rename", "done")
]


@pytest.fixture
def place(make_place) -> Place:
    return make_place(save_total_limit="2")


@pytest.fixture
def reference(place: Place) -> Outcome:
    return place.finish("reference")


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def survives(place: Place, reference: Outcome, fault: str, name: str, expected: list[str]) -> None:
    run = place.begin(name, fault=fault)
    assert run.wait() == -9, run.text[-2000:]
    assert names(place.folder / name) == expected, fault
    assert all(find_fault(folder) is None for folder in list_checkpoints(place.folder / name))
    assert place.finish(name) == reference, fault
    assert not [path for path in (place.folder / name).iterdir() if path.name.startswith((".staging", ".trash"))]


def test_a_checkpoint_has_the_files_that_the_faults_count(place, reference):
    folder = place.folder / "reference"
    assert len(list((list_checkpoints(folder)[0]).iterdir())) == NUM_FILES
    assert (folder / "last").resolve() == list_checkpoints(folder)[-1].resolve()


def test_a_kill_inside_a_save_leaves_the_checkpoint_before(place, reference):
    for number, fault in enumerate(random.Random(5).sample(IN_A_SAVE[:-1], 3)):
        survives(place, reference, fault, f"killed-{number}", ["checkpoint-2"])


def test_a_kill_after_the_rename_or_while_an_old_one_goes_leaves_the_new_one(place, reference):
    survives(place, reference, "save.done:2:kill", "renamed", ["checkpoint-2", "checkpoint-4"])
    survives(place, reference, "save.prune:1:kill", "pruned", ["checkpoint-4", "checkpoint-6"])


def test_a_kill_while_the_result_is_written_changes_nothing_of_it(place, reference):
    for moment in (1, 2):
        assert place.begin("late", fault=f"final:{moment}:kill").wait() == -9
    assert place.finish("late") == reference


def test_a_run_that_goes_back_to_an_older_checkpoint_keeps_what_it_writes_then(place, reference):
    assert place.begin("back", "async_save=false", "save_total_limit=9", fault="step:8:kill").wait() == -9
    back = [f"resume_from_checkpoint={place.folder / 'back' / 'checkpoint-2'}", "async_save=false", "save_steps=1"]
    assert place.begin("back", *back, fault="step:3:kill").wait() == -9  # after checkpoint-4, whose name was taken
    assert names(place.folder / "back") == ["checkpoint-3", "checkpoint-4"]
    run = place.begin("back")
    assert run.wait() == 0
    assert "continuing checkpoint-4" in run.text
    assert place.outcome("back") == reference


@pytest.mark.long
@pytest.mark.parametrize("fault", IN_A_SAVE[:-1])
def test_a_kill_at_every_file_of_a_save(place, reference, fault):
    survives(place, reference, fault, "killed", ["checkpoint-2"])


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


@pytest.fixture
def stopped(place: Place) -> Path:
    """A run that was killed after checkpoint-4."""
    assert place.begin("stopped", "async_save=false", fault="step:6:kill").wait() == -9
    assert names(place.folder / "stopped") == ["checkpoint-2", "checkpoint-4"]
    return place.folder / "stopped"


def damaged_is_named(place: Place, stopped: Path, reference: Outcome, file: str, how: str) -> None:
    name = f"{how} {file}"
    shutil.copytree(stopped, place.folder / name, symlinks=True)
    shutil.copyfile(place.folder / "stopped.trace", place.folder / f"{name}.trace")
    damage(place.folder / name / "checkpoint-4" / file, how)
    run = place.begin(name, "async_save=false")
    assert run.wait() == 0, run.text[-3000:]
    assert f"checkpoint-4 is not used: {file}" in run.text
    assert "continuing checkpoint-2" in run.text
    assert place.outcome(name) == reference


def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(place, stopped, reference):
    files = sorted(path.name for path in (stopped / "checkpoint-4").iterdir())
    rng = random.Random(3)
    for how in ("flip", "truncate", "delete"):
        damaged_is_named(place, stopped, reference, rng.choice(files), how)


@pytest.mark.long
def test_each_damaged_file_is_named(place, stopped, reference):
    for path in sorted((stopped / "checkpoint-4").iterdir()):
        for how in ("flip", "truncate", "delete"):
            damaged_is_named(place, stopped, reference, path.name, how)


def test_where_no_checkpoint_is_intact_the_run_stops(place, stopped):
    for folder in list_checkpoints(stopped):
        damage(folder / "optimizer.safetensors", "flip")
    run = place.begin("stopped", "async_save=false")
    assert run.wait() == 1
    assert run.text.count("optimizer.safetensors is damaged") == 2
    assert "none of 2 checkpoints is intact" in run.last_line


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(place, reference):
    run = place.begin("full", fault="save.file:5:enospc,save.file:18:eio")
    assert run.wait() == 0
    assert run.text.count("could not be saved") == 2
    assert place.outcome("full") == reference


def test_files_that_cannot_grow_end_with_74_and_whole_weights(place, reference):
    run = place.begin("limited", fsize=40_000)  # the optimizer's file is larger, the weights are not
    assert run.wait() == 74, run.text[-2000:]
    assert "checkpoint-2 could not be saved" in run.text
    assert "Training is done, and the weights in" in run.last_line
    assert names(place.folder / "limited") == []
    assert place.outcome("limited").weights == reference.weights


def test_a_real_disk_that_fills_up(place):
    (place.folder / "disk").mkdir()
    check = ["runs", "verify", str(place.folder / "disk")]
    run = place.begin(
        "disk", "save_total_limit=null", tmpfs=[str(place.folder / "disk"), "600k"], then=[check]
    )  # fmt: skip
    code = run.wait()
    if "Operation not permitted" in run.text:
        pytest.skip("this system lets no test mount a tmpfs")
    assert code == 74, run.text[-3000:]
    assert "could not be saved" in run.text
    assert "No space left on device" in run.text or "MB are free" in run.text
    assert "checkpoint-2: intact" in run.text
    assert ", 0 broken\nthen runs: 0" in run.text


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(place):
    (place.folder / "readonly").mkdir()
    run = place.begin("readonly", tmpfs=[str(place.folder / "readonly"), "600k", True])
    code = run.wait()
    if "Operation not permitted" in run.text:
        pytest.skip("this system lets no test mount a tmpfs")
    assert code == 2, run.text[-3000:]
    assert f"output_dir (command line): {place.folder / 'readonly'}" in run.text
    assert "choose another folder, or change its permissions" in run.text


def test_a_folder_that_turns_read_only_ends_with_74_and_whole_checkpoints(place):
    sign, done = place.folder / "errors", place.folder / "errors done"
    folder = place.folder / "worn"
    check = ["runs", "verify", str(folder)]
    run = place.begin("worn", fault="step:6:sleep=1.5", readonly_when=[str(folder), str(sign)], then=[check])
    try:
        run.reach_fault()
    except AssertionError:
        if "Operation not permitted" in run.text:
            pytest.skip("this system lets no test mount")
        raise
    sign.touch()
    until = time.monotonic() + 20
    while not done.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert done.exists()
    assert run.wait() == 74, run.text[-3000:]
    assert "checkpoint-6 could not be saved" in run.text
    assert "Read-only file system" in run.text
    assert "checkpoint-4 is the newest that could be saved" in run.text
    assert "checkpoint-4: intact" in run.text
    reference = place.finish("reference")
    assert place.finish("worn") == reference  # the disk is well again


def test_a_folder_that_is_removed_while_it_is_used(place, reference):
    run = place.begin("gone", fault="step:3:sleep=1")
    run.reach_fault()
    (place.folder / "gone").rename(place.folder / "removed")  # at once: the run's threads may be writing
    shutil.rmtree(place.folder / "removed")
    assert run.wait() == 0, run.text[-3000:]
    assert place.outcome("gone").weights == reference.weights


def test_a_final_save_that_fails_ends_with_74(place):
    run = place.begin("final", fault="save.file:*:enospc")
    assert run.wait() == 74
    record = json.loads((place.folder / "final" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "Training is done" in record["error"]
    assert place.begin("final").wait() == 0


def test_weights_alone_are_saved_and_not_continued(place):
    reference = place.finish("reference")
    only = "save_only_model=true"
    assert place.finish("whole", only).weights == reference.weights
    assert not list((place.folder / "whole" / "last").glob("optimizer*"))
    assert place.begin("weights", only, "async_save=false", fault="step:5:kill").wait() == -9
    run = place.begin("weights", only)
    assert run.wait() == 1
    assert "checkpoint-4 holds weights only (save_only_model), so training cannot continue from it exactly" in run.text
    assert find_fault(place.folder / "weights" / "checkpoint-4") is None  # and it is still there


@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_a_log_that_cannot_be_written_stops_no_training(place, reference, error):
    run = place.begin("log", fault=f"log:2:{error},log:3:{error},log:9:{error}")
    assert run.wait() == 0, run.text[-3000:]
    assert run.text.count("trainer_log.jsonl cannot be written") == 1
    found = place.outcome("log")
    assert (found.weights, found.rows) == (reference.weights, reference.rows)
    assert found.losses == [row for row in reference.losses if row[0] not in (2, 3, 9)]


@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_tokens_that_cannot_be_kept_end_the_run_before_it_begins_and_nothing_half_is_read(place, reference, error):
    cache = place.folder / "tokens"
    fresh = f"tokenized_path={cache}"
    run = place.begin("kept", fresh, fault=f"tokens.write:1:{error}")
    assert run.wait() == 3, run.text[-3000:]
    assert "tokenised rows cannot be written" in run.text
    assert not list(cache.rglob("*.safetensors*"))
    assert place.finish("kept", fresh) == reference


def test_tokens_that_cannot_be_read_are_made_again(place, reference):
    fresh = f"tokenized_path={place.folder / 'tokens'}"
    assert place.finish("first", fresh) == reference
    run = place.begin("again", fresh, fault="tokens.read:1:eio")
    assert run.wait() == 0, run.text[-3000:]
    assert "are damaged (000000.safetensors cannot be read: [Errno 5] Input/output error)" in run.text
    assert place.outcome("again") == reference
