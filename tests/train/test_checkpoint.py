"""A checkpoint is complete or not there; damage is named; what goes in comes out."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.optimizer_steps import take_steps

from llamafactory.extras.errors import LlamaFactoryError, SaveError
from llamafactory.train.checkpoint import random_state
from llamafactory.train.checkpoint.folders import list_checkpoints, newest_checkpoint, point, prune
from llamafactory.train.checkpoint.manifest import find_fault, seal
from llamafactory.train.checkpoint.saver import Retention, SavePlan, Saver, publish, require_room
from llamafactory.train.checkpoint.snapshot import Snapshot, restore_training
from llamafactory.train.checkpoint.state import RunState, load_state
from llamafactory.train.checkpoint.tensors import host_copy, optimizer_state

STATE = RunState(
    run_id="a", step=3, epoch=0.5, scheduler={"last_epoch": 3, "_last_lr": [0.1]}, log_history=[{"loss": 1.5}],
    num_tokens=100, num_supervised_tokens=70, seconds=1.25,
)  # fmt: skip


def make_optimizer(seed=0):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    return torch.optim.AdamW([{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}], lr=1e-2)


def write_model(folder):
    (folder / "weights.safetensors").write_bytes(b"0123456789")


def snapshot_of(state, optimizer=None, write=write_model):
    return Snapshot(
        state=state,
        write_model=write,
        optimizer=None if optimizer is None else optimizer_state(optimizer),
        generators={f"0.{name}": tensor for name, tensor in random_state.Generators().tensors().items()},
    )


def save(tmp_path, step=3, optimizer=None, limit=None, run_id="a", times_continued=0, **changes):
    state = dataclasses.replace(STATE, step=step, run_id=run_id, **changes)
    retention = Retention(limit=limit, keeps_best=bool(state.best))
    plan = SavePlan(output_dir=tmp_path, retention=retention, facts={"times_continued": times_continued})
    return publish(plan, snapshot_of(state, optimizer or make_optimizer()))[0]


def test_state_optimizer_and_random_numbers_come_back(tmp_path):
    optimizer = make_optimizer()
    take_steps(optimizer, 2)
    random.gauss(0, 1)
    np.random.standard_normal()
    folder = save(tmp_path, optimizer=optimizer)
    expected = [torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1), np.random.standard_normal()]
    take_steps(optimizer, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)

    other = make_optimizer()
    restore_training(folder, other)
    found = [torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1), np.random.standard_normal()]
    assert load_state(folder) == STATE
    assert found[0].equal(expected[0])
    assert (found[1] == expected[1]).all()
    assert found[2:] == expected[2:]
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.01]


def test_a_restored_optimizer_takes_the_same_steps(tmp_path):
    one, other = make_optimizer(), make_optimizer()
    take_steps(one, 2)
    folder = save(tmp_path, optimizer=one)
    for ours, theirs in zip(_parameters(other), _parameters(one), strict=True):
        ours.data.copy_(theirs.data)
    restore_training(folder, other)
    for optimizer in (one, other):
        torch.manual_seed(5)
        take_steps(optimizer, 3)
    assert all(ours.equal(theirs) for ours, theirs in zip(_parameters(one), _parameters(other), strict=True))


def _parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


FILES = ("weights.safetensors", "optimizer.safetensors", "rng_state.safetensors", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_previous_checkpoint_is_used(tmp_path, name, damage, capsys):
    previous, newest = save(tmp_path, step=3), save(tmp_path, step=4)
    target = newest / name
    content = target.read_bytes()
    if damage == "delete":
        target.unlink()
    else:
        target.write_bytes(content[:-1] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    assert name in (find_fault(newest) or "")
    assert newest_checkpoint(tmp_path) == previous
    assert f"{newest} is not used: {name}" in capsys.readouterr().err


def test_files_are_durable_before_the_folder_gets_its_name_and_that_before_an_older_one_goes(tmp_path, monkeypatch):
    """A loss of power at any moment leaves a whole checkpoint: what is flushed and renamed comes in this order."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor):
        fsync(descriptor)
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def move(self, target):
        events.append(("rename", self.name))
        return rename(self, target)

    def write_in_parts(folder):
        write_model(folder)
        (folder / "shards" / "rank").mkdir(parents=True)
        (folder / "shards" / "rank" / "0.safetensors").write_bytes(b"0")

    save(tmp_path, step=2)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", move)
    plan = SavePlan(output_dir=tmp_path, retention=Retention(limit=1))
    folder, _ = publish(plan, snapshot_of(STATE, make_optimizer(), write_in_parts))
    monkeypatch.undo()

    staging = f".staging-3-{os.getpid()}"
    renamed = events.index(("rename", staging))
    before = [Path(path).relative_to(tmp_path / staging).as_posix() for _, path in events[:renamed]]
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    assert sorted(before) == sorted([*written, "."])
    manifest = before.index("MANIFEST.json")
    assert {name for name in written if (folder / name).is_file()} == set(before[: manifest + 1])
    assert before[-1] == "."
    parent, removed = events.index(("fsync", str(tmp_path))), events.index(("rename", "checkpoint-2"))
    assert renamed < parent < removed


def test_a_folder_without_manifest_is_never_used(tmp_path):
    folder = save(tmp_path)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(LlamaFactoryError, match="none of 1 checkpoints is intact"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_at_all_is_not_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def full_disk(folder):
    (folder / "weights.safetensors").write_bytes(b"01")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_async", [True, False])
def test_a_failing_save_leaves_the_previous_checkpoint_and_no_half_folder(tmp_path, is_async, capsys):
    with Saver(SavePlan(output_dir=tmp_path, is_async=is_async)) as saver:
        saver.save(snapshot_of(STATE, make_optimizer()))
        saver.wait()
        assert saver.failure is None
        saver.save(snapshot_of(dataclasses.replace(STATE, step=4), make_optimizer(), write=full_disk))
        saver.wait()
        assert "checkpoint-4 could not be saved" in (saver.failure or "")
        assert saver.last == tmp_path / "checkpoint-3"
    assert "No space left on device; checkpoint-3 stays; training goes on" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert not list(tmp_path.glob(".staging-*"))


def test_a_mistake_in_the_writer_is_raised_in_the_main_thread(tmp_path):
    def broken(folder):
        raise TypeError("a mistake")

    saver = Saver(SavePlan(output_dir=tmp_path))
    saver.save(snapshot_of(STATE, make_optimizer(), write=broken))
    with pytest.raises(TypeError, match="a mistake"):
        saver.wait()


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(SaveError, match=r"needs 1,000,000,000,000 MB for a checkpoint, and .* MB are free"):
        require_room(tmp_path, 10**18)


def test_files_are_durable_before_the_name_and_the_name_before_old_ones_go(tmp_path, monkeypatch):
    save(tmp_path, step=3)
    events = []
    fsync, rename, names = os.fsync, Path.rename, {}

    def fsync_seen(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename_seen(path, target):
        events.append(("rename", str(path), str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync_seen)
    monkeypatch.setattr(Path, "rename", rename_seen)
    folder = save(tmp_path, step=4, limit=1)
    [renamed] = [place for place, event in enumerate(events) if event[0] == "rename" and event[2] == str(folder)]
    staging = events[renamed][1]
    names = [Path(event[1]).name for event in events[:renamed] if event[0] == "fsync"]
    assert set(FILES) < set(names)
    assert names[-2:] == ["MANIFEST.json", Path(staging).name]
    assert events[renamed + 1] == ("fsync", str(tmp_path))
    [removed] = [place for place, event in enumerate(events) if event[0] == "rename" and ".trash-" in event[2]]
    assert removed > renamed + 1


def test_the_best_checkpoint_outlives_the_limit(tmp_path):
    best = {"metric": "eval_loss", "value": 1.0, "step": 1, "num_worse": 0}
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step, limit=2, best=best)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    assert os.readlink(tmp_path / "best") == "checkpoint-1"
    assert os.readlink(tmp_path / "last") == "checkpoint-4"


def test_a_folder_named_best_that_is_no_link_is_left_alone(tmp_path):
    (tmp_path / "best").mkdir()
    save(tmp_path)
    point(tmp_path, "best", "checkpoint-3")
    assert not (tmp_path / "best").is_symlink()


def test_checkpoints_of_another_run_are_not_resumed(tmp_path, capsys):
    save(tmp_path, step=1000, run_id="an older run")
    ours = save(tmp_path, step=3)
    assert newest_checkpoint(tmp_path, "a") == ours
    assert "another run wrote it (an older run)" in capsys.readouterr().err


def test_a_host_copy_keeps_what_is_shared_and_does_not_change_with_the_original():
    weight = torch.ones(3)
    frozen = torch.zeros(2)
    copies = host_copy({"a": weight, "tied": weight, "base": frozen}, {frozen.data_ptr()})
    weight.add_(1)
    assert copies["a"].tolist() == [1, 1, 1]
    assert copies["a"].data_ptr() == copies["tied"].data_ptr() != weight.data_ptr()
    assert copies["base"].data_ptr() == frozen.data_ptr()


def test_a_rank_that_was_not_there_keeps_its_own_random_state():
    tensors = {f"0.{name}": tensor for name, tensor in random_state.Generators().tensors().items()}
    before = torch.get_rng_state()
    assert random_state.restore(tensors, 0)
    assert not random_state.restore(tensors, 1)
    assert torch.get_rng_state().equal(before)


def test_the_limit_removes_own_checkpoints_only(tmp_path):
    save(tmp_path, step=1000, run_id="an older run")
    for step in (1, 2, 3):
        save(tmp_path, step=step, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-1000"]


def names_in(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_written_later_is_newer_than_what_has_more_steps(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step=step)
    save(tmp_path, step=3, times_continued=1)  # the run went on from checkpoint-2
    assert newest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-3"
    save(tmp_path, step=4, times_continued=1, limit=2)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_a_damaged_checkpoint_takes_no_place_of_an_intact_one(tmp_path):
    for step in (2, 4, 6):
        damaged = save(tmp_path, step=step)
    (damaged / "weights.safetensors").unlink()
    prune(tmp_path, "a", 1)
    assert names_in(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert newest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-4"


def test_a_checkpoint_of_another_run_with_the_same_step_is_put_aside(tmp_path, capsys):
    save(tmp_path, step=3, run_id="0123456789ab")
    ours = save(tmp_path, step=3)
    assert newest_checkpoint(tmp_path, "a") == ours
    assert find_fault(tmp_path / "checkpoint-3-of-01234567") is None
    assert "is now checkpoint-3-of-01234567" in capsys.readouterr().err


def test_a_checkpoint_of_a_later_version_is_named(tmp_path):
    manifest = save(tmp_path) / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    assert find_fault(manifest.parent) == "MANIFEST.json has format 99, and this version reads up to 2"


def test_weights_alone_cannot_be_resumed(tmp_path):
    folder, _ = publish(SavePlan(output_dir=tmp_path), snapshot_of(STATE))
    assert find_fault(folder) is None
    with pytest.raises(LlamaFactoryError, match="holds weights only"):
        restore_training(folder, make_optimizer())


def test_there_is_no_pickle_in_a_checkpoint(tmp_path):
    folder = save(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == set(FILES)


def test_a_whole_state_is_newer_than_weights_alone(tmp_path, capsys):
    whole = save(tmp_path, step=3)
    weights, _ = publish(SavePlan(output_dir=tmp_path), snapshot_of(dataclasses.replace(STATE, step=5)))
    assert newest_checkpoint(tmp_path, "a") == whole
    assert f"{weights} is not used: it holds weights only" in capsys.readouterr().err
    (whole / "weights.safetensors").unlink()
    assert newest_checkpoint(tmp_path, "a") == weights  # what resumes from it says what to do


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "config.json", "model.safetensors.index.json", "a/b.safetensors"]
)
def test_a_file_that_a_loader_would_read_beside_those_of_a_checkpoint_is_a_fault(tmp_path, name):
    folder = save(tmp_path)
    (folder / "notes.txt").write_text("said something")
    assert find_fault(folder) is None
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert find_fault(folder, hashes=False).startswith(f"{name} is not of this checkpoint")


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors", "rng_state.safetensors"])
def test_what_was_saved_wrong_is_one_clear_error(tmp_path, name):
    folder = save(tmp_path)
    (folder / name).write_text("{}")
    (folder / "MANIFEST.json").unlink()
    seal(folder, {"run_id": "a", "step": 3})
    assert find_fault(folder) is None
    read = load_state if name == "trainer_state.json" else lambda folder: restore_training(folder, make_optimizer())
    with pytest.raises(LlamaFactoryError, match="checkpoint-3 cannot be used: its files are as they were saved"):
        read(folder)
