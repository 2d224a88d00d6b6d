"""DeepSpeed configurations as users of transformers and LLaMA Factory write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamafactory.compose import resolve_config
from llamafactory.hparams.deepspeed import read_deepspeed
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.sharding import check_sharding, configuration_files, sharding_of
from llamafactory.hparams.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
FULL = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto",
                  "warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
"""What circulates: every section that people copy."""


def config(given, **train):
    return RunConfig(command="train", train=TrainConfig(deepspeed=given, **train))


def faults(given, **train):
    return [f"{problem.render()}" for problem in check_sharding(config(given, **train))]


def changed(path, value):
    """`FULL` with one value more."""
    found = json.loads(json.dumps(FULL))
    *parents, last = path.split(".")
    section = found
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return found


@pytest.mark.parametrize(
    ("zero", "words", "weights"),
    [
        ({"stage": 1}, "shard_grad_op", "whole"),
        ({"stage": 2}, "shard_grad_op", "whole"),
        ({"stage": 3}, "full_shard", "sharded"),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, "full_shard", "whole"),
    ],
)
def test_a_stage_says_what_is_spread(zero, words, weights):
    sharding = sharding_of(config({"zero_optimization": zero}))
    assert sharding is not None
    assert (sharding.words, sharding.weights, sharding.asked_by) == (words, weights, "deepspeed")


@pytest.mark.parametrize("given", [None, "", {}, {"zero_optimization": {"stage": 0}}, {"bf16": {"enabled": False}}])
def test_nothing_is_spread(given):
    assert sharding_of(config(given)) is None
    assert not faults(given)


def test_what_circulates_is_read_and_what_has_no_effect_is_listed():
    assert not faults(FULL)
    request, _ = read_deepspeed(config(FULL))
    assert request is not None
    assert set(request.without_effect) == {
        "steps_per_print", "zero_allow_untested_optimizer", "overlap_comm", "contiguous_gradients", "sub_group_size",
        "stage3_max_live_parameters", "stage3_max_reuse_distance",
    }  # fmt: skip


def test_offloading_is_said_to_have_no_effect():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    request, problems = read_deepspeed(config({"zero_optimization": zero}))
    assert not problems
    assert request is not None
    assert list(request.without_effect) == ["offload_optimizer"]


def test_the_default_warm_up_of_deepspeed_is_another_one():
    request, _ = read_deepspeed(config(FULL, warmup_steps=10))
    assert request is not None
    assert "logarithmic" in request.without_effect["scheduler.params.warmup_type"]


def test_a_section_that_is_off_asks_for_nothing():
    assert not faults(changed("amp", {"enabled": False, "opt_level": "O1"}))
    assert not faults(changed("bfloat16", {"enabled": True}), bf16=True)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples" / "deepspeed").glob("*.json")))
def test_the_examples(name):
    path = str(ROOT / "examples" / "deepspeed" / name)
    assert not faults(path)
    request, _ = read_deepspeed(config(path))
    assert request is not None
    assert request.name == name
    assert f"ds_z{request.stage}" in name


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train_micro_batch_size_per_gpu", 3, "differs from per_device_train_batch_size: 8"),
        ("gradient_accumulation_steps", 3, "differs from gradient_accumulation_steps: 1"),
        ("gradient_clipping", 0.5, "max_grad_norm: 0.5"),
        ("train_batch_size", 9, "not a multiple"),
        ("bf16.enabled", True, "differs from bf16: false"),
        ("fp16.enabled", True, "differs from fp16: false"),
        ("optimizer.params.lr", 0.1, "differs from learning_rate"),
        ("optimizer.params.betas", [0.9, 0.95], "adam_beta1, adam_beta2"),
        ("optimizer.type", "OneBitAdam", "not implemented"),
        ("optimizer.params.adam_w_mode", False, "would change the numbers"),
        ("scheduler.type", "OneCycle", "lr_scheduler_type"),
        ("scheduler.type", "WarmupLR", "lr_scheduler_type: constant_with_warmup"),
        ("scheduler.params.warmup_type", "log", "linear"),
        ("zero_optimization.stage", 4, "not a ZeRO stage"),
        ("zero_optimization.stage", True, "not a ZeRO stage"),
        ("zero_optimization.zero_quantized_gradients", True, "would change the numbers"),
        ("zero_optimization.overlap_com", True, "did you mean 'zero_optimization.overlap_comm'"),
        ("zero_optimisation.stage", 2, "did you mean 'zero_optimization.stage'"),
        ("tensor_parallel.autotp_size", 2, "would change the numbers"),
        ("amp.enabled", True, "known, but not implemented"),
        ("elasticity.enabled", True, "known, but not implemented"),
        ("gradient_predivide_factor", 2.0, "would change the numbers"),
        ("communication_data_type", "fp16", "would change the numbers"),
        ("gradient_clipping", "0.5", "max_grad_norm: 0.5"),
        ("gradient_clipping", float("nan"), "gradient_clipping: NaN"),
        ("fp16", True, "fp16: must be a section"),
        ("bf16", True, "bf16: must be a section"),
        ("optimizer", "AdamW", "optimizer: must be a section"),
        ("zero_optimization", [{"stage": 3}], "zero_optimization: must be a section"),
        ("zero_optimization", "auto", "zero_optimization: must be a section"),
        ("zero_optimization.stage", None, "stage: null"),
        ("zero_optimization.stage", "auto", "not a ZeRO stage"),
        ("zero_optimization.enabled", False, "zero_optimization.enabled: unknown key"),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save", 2, "not a boolean"),
        ("stage3_gather_16bit_weights_on_model_save", True, "unknown key"),
        ("zero_optimisation", {}, "unknown key"),
        ("ampp", {"enabled": False}, "unknown key"),
        ("fp16.loss_scael", 0, "unknown key"),
        ("Zero_Optimization", {"stage": 3}, "did you mean 'zero_optimization.stage'"),
        ("zero_stage", 3, "accelerate's name; in a DeepSpeed configuration it is zero_optimization.stage"),
        ("scheduler.params.cos_min_ratio", 0.1, "would change the numbers"),
        ("optimizer.params.betas", [0.9, 0.999, 1], "adam_beta1, adam_beta2"),
    ],
)
def test_what_differs_from_the_run_is_refused_by_name(path, value, words):
    found = faults(changed(path, value))
    assert len(found) == 1, found
    assert words in found[0]
    assert found[0].startswith("deepspeed: ")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"fsdp": True}, "not beside fsdp"),
        ({"fsdp_config": {"version": 2}}, "does nothing without fsdp"),
        ({"fp16": True}, "bf16: true"),
        ({"optim": "adafactor"}, "deepspeed spreads them"),
        ({"predict_with_generate": True}, "without deepspeed"),
        ({"stage": "grpo"}, "remove deepspeed"),
    ],
)
def test_what_cannot_stand_beside_it(train, words):
    found = faults({"zero_optimization": {"stage": 2}}, **train)
    assert len(found) == 1, found
    assert words in found[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_clipping", "1.0"),
        ("gradient_accumulation_steps", "1"),
        ("train_batch_size", "AUTO"),
        ("zero_optimization.stage", "3"),
        ("zero_optimization.stage", 3.0),
        ("zero_optimization.reduce_bucket_size", "5e8"),
        ("optimizer.params.betas", ["auto", "auto"]),
        ("optimizer.params.eps", "1e-8"),
        ("bf16.enabled", "false"),
        ("amp.enabled", "false"),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save", "true"),
        ("zero_optimization.gather_16bit_weights_on_model_save", True),
        ("scheduler.params.last_batch_iteration", -1),
        ("optimizer", {}),
        ("scheduler", None),
    ],
)
def test_what_is_written_otherwise_says_the_same(path, value):
    """Numbers and booleans as text, a stage with a point, empty sections."""
    given = changed(path, value)
    assert not faults(given)
    sharding, plain = sharding_of(config(given)), sharding_of(config(FULL))
    assert sharding is not None
    assert plain is not None
    assert (sharding.words, sharding.weights, sharding.source) == (plain.words, plain.weights, plain.source)
    assert sharding.source == "deepspeed: deepspeed, ZeRO stage 3"


@pytest.mark.parametrize("depth", [30, 400])
def test_a_deeply_nested_mapping_is_one_unknown_key(depth):
    given = 1
    for _ in range(depth):
        given = {"a": given}
    assert len(faults(given)) == 1


def test_long_names_and_many_problems_are_cut():
    assert all(len(fault) < 1000 for fault in faults({"x" * 100_000: "y" * 100_000}))
    assert len(faults({f"key{number}": 1 for number in range(1000)})) == 21


def test_the_command_plan_refuses_what_train_refuses():
    wrong = RunConfig(command="plan", train=TrainConfig(deepspeed=FULL, fp16=True))
    assert [problem.key for problem in check_sharding(wrong)] == ["fp16"]


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config"])
def test_a_file_in_the_home_folder_with_the_mark_of_windows(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {"zero_optimization": {"stage": 2}} if key == "deepspeed" else {"reshard_after_forward": False}
    (tmp_path / "file.json").write_text(json.dumps(content), encoding="utf-8-sig")
    cfg = RunConfig(command="train", train=TrainConfig(**{key: "~/file.json"}, fsdp=key != "deepspeed"))
    assert not list(check_sharding(cfg))
    sharding = sharding_of(cfg)
    assert sharding is not None
    assert sharding.words == "shard_grad_op"
    assert configuration_files(cfg) == {key: content}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("[1]", "holds a list"),
        ('{"a": 1,}', "not valid JSON"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "'stage' is given twice"),
        (json.dumps({"x": "y" * 1_000_000}), "more than 1,000,000 bytes"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    found = faults(str(path))
    assert len(found) == 1
    assert words in found[0]


def test_a_key_given_twice_on_the_command_line_is_refused():
    words = ["output_dir=out", "model_name_or_path=m", 'deepspeed={"zero_optimization": {"stage": 3, "stage": 2}}']
    found = [problem.message for problem in resolve_config(words).problems if problem.key == "deepspeed"]
    assert found == ["'stage' is given twice"]


WORDS = ["output_dir=out", "model_name_or_path=m", "do_train=false"]


@pytest.mark.parametrize("first", ["deepspeed={file}", 'deepspeed={{"zero_optimization": {{"stage": 3}}}}', None])
def test_an_entry_on_the_command_line_is_added_to_a_mapping_and_never_replaces_a_file(tmp_path, first):
    """Before, the entry took the place of the whole file in silence."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    given = [] if first is None else [first.format(file=file)]
    resolution = resolve_config([*WORDS, *given, "deepspeed.zero_optimization.overlap_comm=true"])
    found = {problem.key: problem for problem in resolution.problems if (problem.key or "").startswith("deepspeed")}
    value = next(value.value for value in resolution.values if value.key == "deepspeed")
    if given and str(file) in given[0]:
        assert list(found) == ["deepspeed.zero_optimization.overlap_comm"]
        assert str(file) in found["deepspeed.zero_optimization.overlap_comm"].message
    else:
        stage = {} if first is None else {"stage": 3}
        assert not found
        assert value == {"zero_optimization": {**stage, "overlap_comm": "true"}}
