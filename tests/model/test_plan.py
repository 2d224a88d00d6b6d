"""Every automatic decision follows from config and hardware, has a reason, and yields to the user's key."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.extras.hardware import Hardware
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.model.demands import Demands
from llamafactory.model.fit import RAM_SHARE
from llamafactory.model.flops import decoder_shape, step_flops
from llamafactory.model.idle_keys import idle_keys
from llamafactory.model.plan import ModelPlan, inference_dtype, plan_training
from llamafactory.model.workload import MicroBatch, Workload

GIB = 2**30


def machine(device: str = "cpu", memory: int = 16 * GIB, has_bf16: bool = True) -> Hardware:
    return Hardware(
        device=device, name=device, num_devices=1, memory_bytes=memory, cpu_threads=2, ram_bytes=memory,
        ram_available_bytes=memory, has_bf16=has_bf16,
    )  # fmt: skip


def config(**options: Any) -> RunConfig:
    parts = {
        name: kind(**{key: value for key, value in options.items() if key in kind.model_fields})
        for name, kind in {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}.items()
    }
    method = importlib.import_module(f"llamafactory.model.adapters.{options.get('finetuning_type', 'lora')}")
    own = {key: value for key, value in options.items() if key in method.Options.model_fields}
    return RunConfig(**parts, adapter_options=method.Options(**own))


def test_every_decision_has_a_reason(tiny_config):
    plan = plan_training(config(), tiny_config(), machine())
    assert set(plan.reasons) == {
        "weight_dtype", "layout", "micro_batch_tokens", "checkpoint_every", "fused_head", "fused_blocks",
    }  # fmt: skip
    assert len(plan.lines()) == len(plan.reasons) + 1
    assert plan.lines()[-1].startswith("memory = ")
    assert (plan.layout, plan.attention, plan.fused_head) == ("flat", "segments", True)


@pytest.mark.parametrize(
    ("options", "count", "line"),
    [({"fsdp": "full_shard"}, 2, "sharding = full_shard: over 2 processes; fsdp (set by you)"),
     ({"deepspeed": {"zero_optimization": {"stage": 2}}}, 3,
      "sharding = shard_grad_op: over 3 processes; deepspeed: deepspeed, ZeRO stage 2"),
     ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 1,
      "sharding = none: there is one process, and so nothing to spread; deepspeed: deepspeed, ZeRO stage 3")],
)  # fmt: skip
def test_what_is_spread_over_how_many_processes(options, count, line, tiny_config):
    assert line in plan_training(config(**options), tiny_config(), machine(), num_devices=count).lines()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, ("float32", "no")), ({"bf16": True}, ("bfloat16", "bf16")), ({"pure_bf16": True}, ("bfloat16", "no")),
     ({"fp16": True}, ("float16", "fp16")), ({"bf16": True, "finetuning_type": "full"}, ("float32", "bf16"))],
)  # fmt: skip
def test_precision(options, expected, tiny_config):
    plan = plan_training(config(**options), tiny_config(), machine("cuda"))
    assert (plan.weight_dtype, plan.autocast) == expected


def test_fused_blocks_are_for_proven_float32_rows_on_a_cpu(tiny_config):
    assert plan_training(config(), tiny_config(), machine()).fused_blocks
    for options, kind, device in (({"fused_kernels": False}, "llama", "cpu"), ({"bf16": True}, "llama", "cpu"),
                                  ({}, "llama", "cuda"), ({}, "gpt2", "cpu")):  # fmt: skip
        assert not plan_training(config(**options), tiny_config(kind), machine(device)).fused_blocks


def test_fused_blocks_serve_prefix_trees_too_and_the_forecast_has_no_holes_then(tiny_config):
    def plan(**options: Any) -> ModelPlan:
        batch = MicroBatch(lengths=((60, 30, 38), (9, 4, 4)), targets=40, num_micro_batches=1)
        work = Workload(
            largest=lambda limit: batch, tokens=145, squares=145, targets=40, num_steps=4, num_tokens=None,
            source="here",
        )  # fmt: skip
        return plan_training(config(**options), tiny_config(), machine(), workload_of=lambda cfg, is_padded: work)

    plain, dropping, off = plan(), plan(lora_dropout=0.1), plan(fused_kernels=False)
    assert (plain.fused_blocks, dropping.fused_blocks, off.fused_blocks) == (True, True, False)
    assert "in training some are not (dropout" in dropping.reasons["fused_blocks"]
    kept, workspace = ([p.costs.memory.parts()[name] for p in (plain, off)] for name in ("activations", "workspace"))
    assert kept[0] < kept[1]
    assert workspace[0] < 0.5 * workspace[1]
    assert dropping.costs.memory.parts()["workspace"] > 0.9 * workspace[1]


def test_fp16_on_a_cpu_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="float16 training needs a GPU"):
        plan_training(config(fp16=True), tiny_config(), machine())


def test_an_unproven_model_type_is_padded_and_cannot_be_packed(tiny_config):
    other = tiny_config("stablelm")
    plan = plan_training(config(), other, machine())
    assert (plan.layout, plan.attention, plan.fused_head, plan.micro_batch_tokens) == ("padded", "sdpa", False, None)
    assert "'stablelm' has no proven padding-free path" in plan.reasons["layout"]
    with pytest.raises(ConfigError, match="packing has no proven leak-free path with model type 'stablelm'"):
        plan_training(config(packing=True), other, machine())


def test_a_model_whose_class_refuses_sdpa_is_padded_with_eager_attention(tiny_config):
    other = tiny_config("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    plan = plan_training(config(), other, machine())
    assert (plan.layout, plan.attention) == ("padded", "eager")
    assert "eager attention, because it has no SDPA attention either" in plan.reasons["layout"]
    with pytest.raises(ConfigError, match="'gptj' has no SDPA attention"):
        plan_training(config(flash_attn="sdpa"), other, machine())
    capped = plan_training(config(), tiny_config("gemma2"), machine())
    assert (capped.layout, capped.attention) == ("flat", "segments")  # which caps scores itself
    assert plan_training(config(flash_attn="disabled"), tiny_config("gemma2"), machine()).attention == "eager"


@pytest.mark.parametrize("choice", ["disabled", "fa2"])
def test_forced_packing_without_the_segment_path_is_refused(choice, tiny_config):
    for key in ("packing", "neat_packing"):
        with pytest.raises(ConfigError, match=f"packing has no proven leak-free path with flash_attn {choice}"):
            plan_training(config(flash_attn=choice, **{key: True}), tiny_config(), machine("cuda"))


def test_attention_keys_win(tiny_config):
    assert plan_training(config(flash_attn="disabled"), tiny_config(), machine()).attention == "eager"
    assert plan_training(config(flash_attn="fa2"), tiny_config(), machine("cuda")).attention == "flash_attention_2"
    with pytest.raises(ConfigError, match="needs a CUDA device; this run is on cpu"):
        plan_training(config(flash_attn="fa2"), tiny_config(), machine())


def test_activations_are_recomputed_only_where_they_do_not_fit(tiny_config):
    large = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=1000, head_dim=64)
    options = {"cutoff_len": 2048}

    def plan(memory: float, **more: Any) -> ModelPlan:
        return plan_training(config(**options, **more), large, machine(memory=int(memory * GIB)), process_bytes=0)

    roomy = plan(100)
    assert roomy.checkpoint_every == 0
    needed = roomy.costs.memory.total / GIB
    least = plan(0.1)
    assert least.checkpoint_every == 1
    assert not least.costs.fits
    partial = plan(0.9 * needed / RAM_SHARE)
    assert partial.checkpoint_every > 1
    assert partial.costs.fits
    assert f"recompute one block of {partial.checkpoint_every}" in partial.reasons["checkpoint_every"]
    assert partial.costs.memory.total < roomy.costs.memory.total
    asked = plan(0.5 * needed, disable_gradient_checkpointing=True)
    assert asked.checkpoint_every == 0
    assert asked.reasons["checkpoint_every"] == "disable_gradient_checkpointing: true (set by you)"


def test_a_pass_is_made_smaller_before_anything_is_recomputed(tiny_config):
    large = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=1000, head_dim=64)
    whole = plan_training(config(cutoff_len=256), large, machine(), process_bytes=0)
    small = plan_training(
        config(cutoff_len=256), large, machine(memory=int(0.8 * whole.costs.memory.total / RAM_SHARE)), process_bytes=0
    )
    assert (whole.micro_batch_tokens, small.micro_batch_tokens, small.checkpoint_every) == (1024, 512, 0)
    assert "smaller passes" in small.reasons["micro_batch_tokens"]


@pytest.mark.parametrize(
    ("asked", "stored", "device", "has_bf16", "expected"),
    [("auto", "bfloat16", "cpu", True, "float32"), ("auto", "float32", "cuda", True, "bfloat16"),
     ("auto", "float16", "cuda", True, "float16"), ("auto", "bfloat16", "cuda", False, "float32"),
     ("float16", "bfloat16", "cpu", True, "float16")],
)  # fmt: skip
def test_inference_precision(asked, stored, device, has_bf16, expected):
    assert inference_dtype(asked, stored, machine(device, has_bf16=has_bf16)) == expected


def test_the_shape_counts_the_weights_of_a_real_model(tiny_config):
    import torch
    from transformers import AutoModelForCausalLM

    config_ = tiny_config(tie_word_embeddings=True)
    shape = decoder_shape(config_)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape is not None
    assert shape.num_params == sum(p.numel() for p in model.parameters()) - norms


def test_flops_are_those_of_the_matrix_products(tiny_config):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config_ = tiny_config(num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config_, attn_implementation="eager")
    ids = torch.randint(0, 96, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    expected = step_flops(config_, lengths=[32], num_targets=32, full=True)
    # eager attention does the upper triangle too: one more time the causal half
    attention = 6 * 2 * 32 * 32 * 32
    assert counter.get_total_flops() == pytest.approx(expected + attention, rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_sizes_that_are_set_win_and_the_plan_says_by_whom(kind, tiny_config):
    plan = plan_training(
        config(cutoff_len=100, micro_batch_tokens=300, loss_chunk_size=64), tiny_config(kind), machine()
    )
    assert (plan.micro_batch_tokens, plan.loss_chunk_rows) == (300, 64)
    assert plan.reasons["micro_batch_tokens"].startswith("micro_batch_tokens (set by you)")
    assert plan.reasons["loss_chunk_rows"] == "loss_chunk_size (set by you)"


def test_a_set_size_stays_where_memory_is_short(tiny_config):
    large = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=1000, head_dim=64)
    options = config(cutoff_len=512, micro_batch_tokens=2048)
    short = plan_training(options, large, machine(memory=GIB // 4), process_bytes=0)
    assert (short.micro_batch_tokens, short.checkpoint_every) == (2048, 1)
    kept = config(cutoff_len=512, micro_batch_tokens=2048, disable_gradient_checkpointing=True)
    assert plan_training(kept, large, machine(memory=GIB // 4), process_bytes=0).checkpoint_every == 0


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_a_token_budget_below_the_longest_row_is_refused(kind, tiny_config):
    with pytest.raises(ConfigError, match=r"micro_batch_tokens[\s\S]*the longest row has 100 tokens[\s\S]*cutoff_len"):
        plan_training(config(cutoff_len=100, micro_batch_tokens=99), tiny_config(kind), machine())


def test_compiled_blocks_are_the_models_own(tiny_config):
    idle = plan_training(config(torch_compile=True), tiny_config(), machine())
    assert (idle.fused_blocks, idle.compiled_blocks) == (True, False)
    assert "fused_kernels: false" in idle.reasons["compiled_blocks"]
    for options in ({"torch_compile": True}, {"torch_compile_backend": "inductor"}, {"torch_compile_mode": "default"}):
        plan = plan_training(config(fused_kernels=False, **options), tiny_config(), machine())
        assert plan.compiled_blocks
        assert "once for all lengths" in plan.reasons["compiled_blocks"]
    assert plan_training(config(torch_compile=True), tiny_config(), machine("cuda")).compiled_blocks
    with pytest.raises(ConfigError, match="compiled blocks are not proven together with fsdp"):
        plan_training(config(torch_compile=True, fsdp="full_shard"), tiny_config(), machine())


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_the_fused_blocks_cannot_train_is_compiled(options, tiny_config):
    given = config(torch_compile=True, **options)
    plan = plan_training(given, tiny_config(), machine())
    assert (plan.fused_blocks, plan.compiled_blocks) == (True, True)
    assert "once for all lengths" in plan.reasons["compiled_blocks"]
    assert idle_keys(given, plan) == []


@pytest.mark.parametrize("demands", [Demands(reference="base"), Demands(reference="copy")])
def test_a_policy_that_is_compared_is_planned_without_dropout(demands, tiny_config):
    given = config(torch_compile=True, lora_dropout=0.1)
    dropping = plan_training(given, tiny_config(), machine())
    plan = plan_training(given, tiny_config(), machine(), demands_of=lambda cfg: demands)
    assert "dropout" in dropping.reasons["fused_blocks"]
    assert "dropout" not in plan.reasons["fused_blocks"]
    assert not plan.compiled_blocks
    assert plan.costs.memory.parts()["activations"] < dropping.costs.memory.parts()["activations"]
    (said,) = idle_keys(given, plan)
    assert said.startswith("torch_compile has no effect")


def test_a_chunk_size_that_no_head_reads_is_a_warning(tiny_config):
    options = config(loss_chunk_size=64)
    assert idle_keys(options, plan_training(options, tiny_config(), machine())) == []
    (said,) = idle_keys(options, plan_training(options, tiny_config("stablelm"), machine()))
    assert said.startswith("loss_chunk_size has no effect on the cross-entropy")
