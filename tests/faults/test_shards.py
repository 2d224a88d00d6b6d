"""Two processes that share one model (FSDP2): the numbers of one process, checkpoints that any number continues."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.faults.ranks import begin, finish, stop_at

from llamafactory.model.shards import read_whole
from llamafactory.train.checkpoint.manifest import find_fault

FULL = {"finetuning_type": "full", "num_train_epochs": "2"}
PARTS = 'fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}'
TWO = ("fsdp=full_shard", "per_device_train_batch_size=1")
CELLS = {
    "full": FULL,
    "lora, accumulation": {"gradient_accumulation_steps": "2"},
    "full, padded, evaluated": {**FULL, "flash_attn": "disabled", "val_size": "4", "eval_strategy": "epoch"},
    "full, packed, recomputed": {**FULL, "packing": "true", "disable_gradient_checkpointing": "false"},
    "lora, bf16": {"bf16": "true"},
    "dpo lora": {"stage": "dpo", "dataset": "pairs"},
    "dpo full": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "full"},
    "kto lora": {"stage": "kto", "dataset": "judged"},
    "rm lora": {"stage": "rm", "dataset": "pairs"},
    "pt full": {"stage": "pt", "dataset": "texts", "finetuning_type": "full", "cutoff_len": "48"},
}


def values(outcome):
    return [float.fromhex(value) for _, _, value in outcome.losses]


def assert_close(ours, theirs, bound=1e-5):
    """Weights of two output folders."""
    found = sorted(theirs.glob("*.safetensors"))
    assert found
    for path in found:
        expected, weights = load_file(path), load_file(ours / path.name)
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            assert (weights[name] - weight).abs().max() <= bound, name


def test_a_shared_model_is_killed_and_goes_on_bit_equal(make_place):
    """Killed before a save, in it, and after it; checkpoints in shards hold no pickle and verify."""
    place = make_place(**FULL)
    whole = finish(place, "whole", 2, *TWO, PARTS)
    stop_at(place, "killed", 2, 4, *TWO, PARTS)
    ranks = begin(place, "killed", 2, *TWO, PARTS, fault="save.shards:1:kill", fault_rank=1)
    assert ranks.wait()[1] == -9, ranks.text[-4000:]
    assert not (place.folder / "killed" / "checkpoint-4").exists()
    killed = finish(place, "killed", 2, *TWO, PARTS)
    assert (killed.losses, killed.weights, killed.rows) == (whole.losses, whole.weights, whole.rows)
    last = place.folder / "killed" / "last"
    assert find_fault(last) is None
    assert {path.suffix for path in last.rglob("*") if path.is_file()} == {".json", ".safetensors", ".jinja"}
    weights, shards = load_file(place.folder / "killed" / "model.safetensors"), read_whole(last / "sharded_weights")
    assert shards.keys() == weights.keys()
    assert all(torch.equal(shards[name], weight) for name, weight in weights.items())
    assert "fused_blocks = False: fsdp" in (place.folder / "whole.0.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_that_share_a_model_equal_one(make_place, cell):
    """Adam makes noise of the size of a gradient's last digits visible where a loss is nearly flat (dpo, rm, kto).

    Shared models go through their own forward pass, and so does the other side: fused blocks have their own tests.
    """
    place = make_place(**CELLS[cell], fused_kernels="false")
    one, two = place.finish("one"), finish(place, "two", 2, *TWO)
    if "bf16" in cell:
        assert values(two) == pytest.approx(values(one), rel=1e-3)
        return
    bound = 1e-5 if CELLS[cell].get("stage", "sft") in ("sft", "pt") else 1e-4
    assert values(two) == pytest.approx(values(one), rel=bound, abs=bound)
    assert_close(place.folder / "two", place.folder / "one", bound)


@pytest.mark.long
@pytest.mark.parametrize("config", [PARTS, "fsdp_config={}"], ids=["weights in shards", "whole weights"])
def test_two_continue_as_one_and_one_as_two(make_place, config):
    """Weights, moments and schedule come along: without the moments Adam would be far off within a step."""
    place = make_place(**FULL, async_save="false")
    whole = finish(place, "whole", 2, *TWO, config)
    stop_at(place, "moved", 2, 4, *TWO, config)
    assert (place.folder / "moved" / "checkpoint-2" / "sharded_optimizer").is_dir()
    stop_at(place, "moved", 1, 6, "fsdp=full_shard", config)
    assert not (place.folder / "moved" / "checkpoint-4" / "sharded_optimizer").exists()
    moved = finish(place, "moved", 2, *TWO, config)
    assert values(moved) == pytest.approx(values(whole), rel=1e-5)
    assert_close(place.folder / "moved", place.folder / "whole")


@pytest.mark.long
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_one_process_that_cannot_write_costs_that_checkpoint_only(make_place, action):
    place = make_place(**FULL)
    ranks = begin(place, "out", 2, *TWO, PARTS, fault=f"save.shards:2:{action}", fault_rank=1)
    assert ranks.wait() == [0, 0], ranks.text[-4000:]
    assert "checkpoint-4 could not be saved" in ranks.runs[0].text
    left = sorted(path.name for path in (place.folder / "out").glob("checkpoint-*"))
    assert "checkpoint-4" not in left
    assert len(left) == 3
    assert all(find_fault(place.folder / "out" / name) is None for name in left)
    assert not list((place.folder / "out").glob(".staging-*"))


@pytest.mark.long
def test_the_best_checkpoint_in_shards_becomes_plain_weights(make_place):
    place = make_place(**FULL, val_size="4", eval_strategy="steps", eval_steps="2", load_best_model_at_end="true")
    finish(place, "out", 2, *TWO, PARTS)
    best = json.loads((place.folder / "out" / "best" / "trainer_state.json").read_text())["best"]["step"]
    shards = read_whole(place.folder / "out" / f"checkpoint-{best}" / "sharded_weights")
    weights = load_file(place.folder / "out" / "model.safetensors")
    assert all(torch.equal(shards[name], weight) for name, weight in weights.items())


@pytest.mark.long
def test_a_checkpoint_in_shards_becomes_a_plain_model_by_one_command(make_place):
    from transformers import AutoModelForCausalLM

    place = make_place(**FULL)
    finish(place, "out", 2, *TWO, PARTS)
    words = [
        "export", f"model_name_or_path={place.folder / 'out' / 'last'}", f"export_dir={place.folder / 'plain'}",
        "template=chatml", "infer_dtype=float32", "use_cpu=true",
    ]  # fmt: skip
    export = place.zygote.start(words, place.folder / "export.log")
    assert export.wait() == 0, export.text[-3000:]
    plain = AutoModelForCausalLM.from_pretrained(place.folder / "plain").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(place.folder / "out").state_dict()
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], weight) for name, weight in ours.items())


@pytest.mark.long
@pytest.mark.parametrize("config", [PARTS, "fsdp_config={}"], ids=["weights in shards", "whole weights"])
def test_killed_at_random_and_bit_equal(make_place, tally, config):
    place = make_place(**FULL, save_steps="1")
    started = time.monotonic()
    whole = finish(place, "whole", 2, *TWO, config)
    span, rng, kills = time.monotonic() - started, random.Random(5), 0
    for _ in range(6):
        ranks = begin(place, "killed", 2, *TWO, config)
        time.sleep(rng.uniform(0.2, 1.0) * span)
        if not ranks.kill():
            break
        kills += 1
    record = json.loads((place.folder / "killed" / "run.json").read_text())
    killed = place.outcome("killed") if record["state"] == "finished" else finish(place, "killed", 2, *TWO, config)
    equal = (killed.losses, killed.weights) == (whole.losses, whole.weights)
    tally.add(f"sft full, two processes, {config}", kills=kills, lost=int(killed.rows != whole.rows), equal=equal)
    assert killed == whole
