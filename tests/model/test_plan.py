"""Every automatic decision follows from config and hardware, has a reason, and yields to the user's key."""

from __future__ import annotations

from typing import Any

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.extras.hardware import Hardware
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.model.memory import activation_bytes, decoder_shape, step_flops
from llamafactory.model.plan import inference_dtype, plan_training

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
    return RunConfig(**parts)


def test_every_decision_has_a_reason(tiny_config):
    plan = plan_training(config(), tiny_config(), machine())
    assert set(plan.reasons) == {
        "weight_dtype", "layout", "micro_batch_tokens", "activation_checkpointing", "fused_head",
    }  # fmt: skip
    assert len(plan.lines()) == len(plan.reasons)
    assert (plan.layout, plan.attention, plan.fused_head) == ("flat", "segments", True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, ("float32", "no")), ({"bf16": True}, ("bfloat16", "bf16")), ({"pure_bf16": True}, ("bfloat16", "no")),
     ({"fp16": True}, ("float16", "fp16")), ({"bf16": True, "finetuning_type": "full"}, ("float32", "bf16"))],
)  # fmt: skip
def test_precision(options, expected, tiny_config):
    plan = plan_training(config(**options), tiny_config(), machine("cuda"))
    assert (plan.weight_dtype, plan.autocast) == expected


def test_fp16_on_a_cpu_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="float16 training needs a GPU"):
        plan_training(config(fp16=True), tiny_config(), machine())


def test_an_unproven_model_type_is_padded_and_cannot_be_packed(tiny_config):
    gemma = tiny_config("gemma2")
    plan = plan_training(config(), gemma, machine())
    assert (plan.layout, plan.attention, plan.fused_head, plan.micro_batch_tokens) == ("padded", "sdpa", False, None)
    assert "'gemma2' has no proven padding-free path" in plan.reasons["layout"]
    with pytest.raises(ConfigError, match="packing has no proven leak-free path with model type 'gemma2'"):
        plan_training(config(packing=True), gemma, machine())


def test_attention_keys_win(tiny_config):
    assert plan_training(config(flash_attn="disabled"), tiny_config(), machine()).attention == "eager"
    assert plan_training(config(flash_attn="fa2"), tiny_config(), machine("cuda")).attention == "flash_attention_2"
    with pytest.raises(ConfigError, match="needs a CUDA device; this run is on cpu"):
        plan_training(config(flash_attn="fa2"), tiny_config(), machine())


def test_activations_are_recomputed_only_where_they_do_not_fit(tiny_config):
    large = tiny_config(hidden_size=2048, intermediate_size=8192, num_hidden_layers=32, vocab_size=1000, head_dim=64)
    roomy, tight = (plan_training(config(), large, machine(memory=size * GIB)) for size in (200, 12))
    assert not roomy.activation_checkpointing
    assert tight.activation_checkpointing
    asked = plan_training(config(disable_gradient_checkpointing=True), large, machine(memory=12 * GIB))
    assert not asked.activation_checkpointing
    assert asked.reasons["activation_checkpointing"] == "disable_gradient_checkpointing: true"


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


def test_activation_bytes_are_near_what_autograd_keeps(tiny_config):
    import torch
    from transformers import AutoModelForCausalLM

    from llamafactory.data.collate import collate_flat
    from llamafactory.data.types import Example
    from llamafactory.model import attention
    from llamafactory.train.logprob import hidden_states

    attention.register()
    config_ = tiny_config(hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32)
    model = AutoModelForCausalLM.from_config(config_, attn_implementation="segments", dtype=torch.float32)
    ids = torch.randint(1, 96, (256,)).int().numpy()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, collate_flat([Example(input_ids=ids, labels=ids)]))
    forecast = activation_bytes(config_, 256)
    assert forecast == pytest.approx(sum(kept.values()), rel=0.25)
