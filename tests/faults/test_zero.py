"""`deepspeed`: two processes that share a model as ZeRO does, held against DeepSpeed itself, and killed.

DeepSpeed is an oracle: `make test-zero` puts it into `build/deepspeed`, where only the reference process finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.faults.harness import ROOT
from tests.faults.ranks import begin, finish, stop_at

from llamafactory.compose import load_config
from llamafactory.data.pipeline import prepare_data
from llamafactory.model.shards import read_whole
from llamafactory.train import text
from llamafactory.train.checkpoint.manifest import find_fault

ORACLE = ROOT / "build" / "deepspeed"
FULL = {"finetuning_type": "full", "disable_shuffling": "true", "num_train_epochs": "1"}


def zero_file(folder, stage, **more):
    """A DeepSpeed configuration that leaves the rest to the run."""
    content = {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
               "zero_optimization": {"stage": stage, "overlap_comm": False, **more}}  # fmt: skip
    path = folder / f"ds_z{stage}.json"
    path.write_text(json.dumps(content))
    return path


def test_a_run_with_zero_3_is_killed_and_goes_on_bit_equal(make_place):
    """It is the run that `fsdp` makes; without the gathering of weights checkpoints hold them in shards."""
    place = make_place(**FULL)
    two = (f"deepspeed={zero_file(place.folder, 3)}", "per_device_train_batch_size=1")
    whole = finish(place, "whole", 2, *two)
    said = (place.folder / "whole.0.log").read_text()
    assert "deepspeed: ds_z3.json asks for ZeRO stage 3: torch's FSDP2 (full_shard)" in said
    shards = (
        "fsdp=full_shard",
        'fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}',
        "per_device_train_batch_size=1",
    )
    assert finish(place, "fsdp", 2, *shards) == whole
    stop_at(place, "killed", 2, 4, *two)
    killed = finish(place, "killed", 2, *two)
    assert (killed.losses, killed.weights, killed.rows) == (whole.losses, whole.weights, whole.rows)
    last = place.folder / "killed" / "last"
    assert find_fault(last) is None
    weights, kept = load_file(place.folder / "killed" / "model.safetensors"), read_whole(last / "sharded_weights")
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())


def test_a_batch_of_another_number_of_processes_is_refused(make_place):
    place = make_place(**FULL)
    path = place.folder / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 2, "zero_optimization": {"stage": 2}}))
    ranks = begin(place, "out", 2, f"deepspeed={path}")
    assert 2 in ranks.wait()
    assert "train_batch_size: 2 processes take 4 rows in a step" in ranks.text


@pytest.mark.long
@pytest.mark.skipif(not ORACLE.is_dir(), reason="make test-zero installs DeepSpeed for this")
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_a_run_has_the_losses_and_weights_of_deepspeed(make_place, faults_model, stage, accumulation):
    place = make_place(**FULL, num_rows=16, gradient_accumulation_steps=str(accumulation), adam_epsilon="1e-6")
    path = zero_file(place.folder, stage)
    ours = finish(place, "ours", 2, f"deepspeed={path}")
    reference = run_deepspeed(place, faults_model, stage, accumulation)
    losses = [float.fromhex(value) for _, key, value in ours.losses if key == "loss"]
    assert len(losses) == 16 // (4 * accumulation)
    assert losses == pytest.approx(reference["losses"], rel=1e-5)
    weights = load_file(place.folder / "ours" / "model.safetensors")
    theirs = load_file(place.folder / "reference" / "model.safetensors")
    start = load_file(faults_model / "model.safetensors")
    gap = max(float((weight - theirs[name]).abs().max()) for name, weight in weights.items())
    moved = max(float((weight - start[name]).abs().max()) for name, weight in weights.items())
    print(f"\nZeRO {stage}, accumulation {accumulation}: weights moved by up to {moved:.1e} and differ by {gap:.1e}")
    assert moved > 1e-2
    assert gap < 1e-5


def run_deepspeed(place, model: Path, stage: int, accumulation: int):
    """Two processes of DeepSpeed on the rows of the run, in its order; losses and version."""
    cfg = load_config(["output_dir=unused", *place.words], command="train")
    tokenizer, template = text.load_text(cfg)
    examples = prepare_data(cfg.data, template, tokenizer, seed=0).train
    rows = [(list(map(int, one.input_ids)), list(map(int, one.labels))) for one in examples]
    size = 4 * accumulation
    request = {
        "model": str(model),
        "learning_rate": 1e-2,
        "epsilon": 1e-6,
        "micro_batches": accumulation,
        "steps": [rows[at : at + size] for at in range(0, len(rows), size)],
        "out": str(place.folder / "reference"),
        "config": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
        },
    }
    file = place.folder / "request.json"
    file.write_text(json.dumps(request))
    script = Path(__file__).with_name("deepspeed_reference.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ORACLE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((place.folder / "reference" / "losses.json").read_text())
