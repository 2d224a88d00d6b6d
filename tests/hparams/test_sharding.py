"""`fsdp` and `fsdp_config` as users of transformers, accelerate and LLaMA Factory write them."""

from __future__ import annotations

import json

import pytest

from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.sharding import Sharding, check_sharding, sharding_of
from llamafactory.hparams.train import TrainConfig


def config(**train):
    return RunConfig(command="train", train=TrainConfig(**train))


def test_reentrant_checkpointing_is_refused():
    both = RunConfig(command="train", train=TrainConfig(fsdp=True), model=ModelConfig(use_reentrant_gc=True))
    assert [problem.key for problem in check_sharding(both)] == ["use_reentrant_gc"]


def faults(**train):
    return [problem.message + " | " + str(problem.fix) for problem in check_sharding(config(**train))]


@pytest.mark.parametrize("off", [None, False, "", "false", "none"])
def test_off(off):
    assert sharding_of(config(fsdp=off)) is None
    assert not faults(fsdp=off)


@pytest.mark.parametrize(
    ("given", "entries", "expected"),
    [
        (True, None, Sharding()),
        ("full_shard auto_wrap", None, Sharding()),
        ("shard_grad_op", None, Sharding(reshard_after_forward=False)),
        (True, {"reshard_after_forward": False}, Sharding(reshard_after_forward=False)),
        (True, {"fsdp_reshard_after_forward": "true"}, Sharding()),
        (True, {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, Sharding(reshard_after_forward=False)),
        (True, {"state_dict_type": "SHARDED_STATE_DICT"}, Sharding(weights="sharded")),
        (True, {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "xla": False}, Sharding()),
        (True, {"fsdp_offload_params": False, "fsdp_state_dict_type": "FULL_STATE_DICT"}, Sharding()),
    ],
)
def test_what_users_write(given, entries, expected):
    assert sharding_of(config(fsdp=given, fsdp_config=entries)) == expected
    assert not faults(fsdp=given, fsdp_config=entries)


def test_a_json_file(tmp_path):
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_version": 1}))
    found = sharding_of(config(fsdp="full_shard", fsdp_config=str(file)))
    assert found is not None
    assert found.weights == "sharded"
    assert found.without_effect == {"version": "FSDP2 is used in any case"}


@pytest.mark.parametrize(
    ("words", "entries", "key"),
    [
        ("full_shard offload", {}, "offload"),
        ("full_shard", {"fsdp_offload_params": True}, "offload_params"),
        ("full_shard", {"cpu_offload": "true"}, "cpu_offload"),
    ],
)
def test_offloading_is_said_to_have_no_effect(words, entries, key):
    found = sharding_of(config(fsdp=words, fsdp_config=entries))
    assert found is not None
    assert list(found.without_effect) == [key]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"fsdp": "hybrid_shard"}, "not implemented"),
        ({"fsdp": "no_shard"}, "leave fsdp out"),
        ({"fsdp": "fullshard"}, "unknown word 'fullshard'"),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "xla: false"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}}, "state_dict_type: not implemented"),
        ({"fsdp": True, "fsdp_config": {"reshard_afterforward": True}}, "did you mean 'reshard_after_forward'"),
        ({"fsdp": True, "fsdp_config": "no/such.json"}, "cannot be read"),
        ({"fsdp_config": {"version": 2}}, "does nothing without fsdp"),
        ({"fsdp": True, "fp16": True}, "bf16: true"),
        ({"fsdp": True, "optim": "adafactor"}, "adamw_torch"),
        ({"fsdp": True, "do_predict": True}, "predict in a run of its own"),
        ({"fsdp": True, "stage": "grpo"}, "not for stage grpo"),
    ],
)
def test_what_is_refused(train, words):
    found = faults(**train)
    assert len(found) == 1
    assert words in found[0]
