"""A checkpoint is complete or not there; damage is named; what goes in comes out."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.train.checkpoint import (
    RunState,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    restore_training,
    save_checkpoint,
    verify_checkpoint,
)

STATE = RunState(
    run_id="a", step=3, epoch=0.5, scheduler={"last_epoch": 3, "_last_lr": [0.1]}, log_history=[{"loss": 1.5}],
    num_tokens=100, num_supervised_tokens=70, seconds=1.25,
)  # fmt: skip


def make_optimizer(seed=0):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    return torch.optim.AdamW([{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}], lr=1e-2)


def take_steps(optimizer, count):
    for _ in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def write_model(folder):
    (folder / "weights.safetensors").write_bytes(b"0123456789")


def save(tmp_path, step=3, optimizer=None, limit=None, run_id="a"):
    state = dataclasses.replace(STATE, step=step, run_id=run_id)
    return save_checkpoint(
        tmp_path, state, write_model=write_model, optimizer=optimizer or make_optimizer(), limit=limit
    )


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
    assert name in (verify_checkpoint(newest) or "")
    assert newest_checkpoint(tmp_path) == previous
    assert f"{newest} is not used: {name}" in capsys.readouterr().err


def test_a_folder_without_manifest_is_never_used(tmp_path):
    folder = save(tmp_path)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(LlamaFactoryError, match="none of 1 checkpoints is intact"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_at_all_is_not_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_a_failing_save_leaves_the_previous_checkpoint_and_no_half_folder(tmp_path):
    save(tmp_path, step=3)

    def full_disk(folder):
        (folder / "weights.safetensors").write_bytes(b"01")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(
            tmp_path, dataclasses.replace(STATE, step=4), write_model=full_disk, optimizer=make_optimizer(), limit=1
        )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert not list(tmp_path.glob(".staging-*"))


def test_the_limit_removes_own_checkpoints_only(tmp_path):
    save(tmp_path, step=1000, run_id="an older run")
    for step in (1, 2, 3):
        save(tmp_path, step=step, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-1000"]


def test_weights_alone_cannot_be_resumed(tmp_path):
    folder = save_checkpoint(tmp_path, STATE, write_model=write_model, optimizer=None, limit=None)
    assert verify_checkpoint(folder) is None
    with pytest.raises(LlamaFactoryError, match="holds weights only"):
        restore_training(folder, make_optimizer())


def test_there_is_no_pickle_in_a_checkpoint(tmp_path):
    folder = save(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == set(FILES)
