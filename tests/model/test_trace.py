"""The traced bytes are those that autograd really keeps, for each family, method and kind of checkpointing."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.model import attention
from llamafactory.model.checkpointing import recompute_blocks
from llamafactory.model.method import apply_method
from llamafactory.model.skeleton import build_skeleton, count_parameters
from llamafactory.model.trace import ActivationTrace, is_recomputed, trace_activations
from llamafactory.model.workload import tokens_of
from llamafactory.train.logprob import hidden_states, unwrap_peft

LENGTHS = (60, 30, 38)
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "head_dim": 16}
METHODS = [("lora", {}), ("lora", {"lora_dropout": 0.1}), ("lora", {"lora_target": ("q_proj",)}), ("full", {})]


def options_of(method: str, options: dict[str, Any]) -> Any:
    return importlib.import_module(f"llamafactory.model.adapters.{method}").Options(**options)


def real_model(config: Any, method: str, options: dict[str, Any], implementation: str = "segments") -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    return apply_method(base, method, options_of(method, options), adapters=(), trainable=True).train()


def kept_bytes(model: Any, batch: Any) -> int:
    """Bytes of the storages that autograd keeps for the hidden states, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden_states(unwrap_peft(model), batch)
    assert states.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def traced(config: Any, method: str, options: dict[str, Any]) -> ActivationTrace:
    skeleton = build_skeleton(
        config, dtype="float32", attention="segments", finetuning_type=method, options=options_of(method, options)
    )
    return trace_activations(skeleton, rows=1, lengths=LENGTHS, is_flat=True)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_traced_bytes_are_what_autograd_keeps(tiny_config, make_examples, model_type, method, options):
    config = tiny_config(model_type, **WIDE)
    measured = kept_bytes(real_model(config, method, options), collate_flat(make_examples(LENGTHS)))
    assert traced(config, method, options).peak(0) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_keep_their_input_only(tiny_config, make_examples, method, every):
    config = tiny_config("llama", **WIDE)
    model = real_model(config, method, {})
    assert recompute_blocks(model, every) == 4 // every
    measured = kept_bytes(model, collate_flat(make_examples(LENGTHS)))
    trace = traced(config, method, {})
    forecast = trace.outside + sum(
        trace.boundary if is_recomputed(index, every) else size for index, size in enumerate(trace.blocks)
    )
    # the first block shares its input with the embedding's output, which counts once
    assert forecast == pytest.approx(measured, rel=0.05, abs=2 * trace.boundary)


@pytest.mark.parametrize("parts", [LENGTHS, ((60, 30, 38), (0, 12, 20), 17)], ids=["rows", "trees"])
@pytest.mark.parametrize(("method", "options"), [METHODS[0], METHODS[3]])
def test_fused_blocks_are_traced_too(tiny_config, make_examples, method, options, parts):
    from llamafactory.model.kernels.decoder import decode

    config = tiny_config("llama", **WIDE)
    model = real_model(config, method, options)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flat = collate_flat(make_examples([tokens_of(part) for part in parts]))
        batch = replace(flat, segment_lengths=parts)
        assert decode(unwrap_peft(model), batch, torch.arange(batch.num_tokens)) is not None
    skeleton = build_skeleton(
        config, dtype="float32", attention="segments", finetuning_type=method, options=options_of(method, options)
    )
    trace = trace_activations(skeleton, rows=1, lengths=parts, is_flat=True, is_fused=True)
    assert trace.peak(0) == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.05)
    plain = trace_activations(skeleton, rows=1, lengths=parts, is_flat=True)
    assert trace.peak(0) < plain.peak(0)


def test_a_padded_batch_of_an_unproven_family(tiny_config, make_examples):
    config = tiny_config("olmo2", **WIDE)
    batch = collate_padded(make_examples((40, 33, 38)), pad_id=0)
    measured = kept_bytes(real_model(config, "lora", {}, "sdpa"), batch)
    skeleton = build_skeleton(
        config, dtype="float32", attention="sdpa", finetuning_type="lora", options=options_of("lora", {})
    )
    forecast = trace_activations(skeleton, rows=3, lengths=(40,), is_flat=False).peak(0)
    assert forecast == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_eager_attention_keeps_its_probabilities(tiny_config, make_examples, dropout):
    config = tiny_config("llama", **WIDE, attention_dropout=dropout)
    batch = collate_padded(make_examples((120, 118)), pad_id=0)
    measured = kept_bytes(real_model(config, "lora", {}, "eager"), batch)
    skeleton = build_skeleton(
        config, dtype="float32", attention="eager", finetuning_type="lora", options=options_of("lora", {})
    )
    forecast = trace_activations(skeleton, rows=2, lengths=(120,), is_flat=False)
    assert forecast.peak(0) == pytest.approx(measured, rel=0.05)
    assert forecast.small == 1.0
    assert forecast.blocks[0] > 4 * 2 * 4 * 120 * 120  # float32 probabilities of 2 rows and 4 heads


def test_holes_in_the_heap_are_those_of_small_tensors_of_a_models_own_forward():
    from llamafactory.model.memory import HEAP_OVERHEAD, HeadShape, StepShape, forecast_memory
    from llamafactory.model.skeleton import ParameterCount

    count = ParameterCount(
        base=10,
        adapter=0,
        trained=0,
        trained_bytes=0,
        weight_bytes=40,
        buffer_bytes=0,
        trained_by_block=(0, 0),
        kinds=(),
    )
    options: dict[str, Any] = {
        "step": StepShape(tokens=1, targets=0, num_micro_batches=1),
        "head": HeadShape(vocab=1, width=1, is_trained=False, chunk_rows=256, element_bytes=4),
        "every": 0, "optimizer_bytes": 0, "process_bytes": 0,
    }  # fmt: skip
    trace = ActivationTrace(blocks=(1000, 1000), outside=0, boundary=0, small=0.5)
    without, with_holes = (forecast_memory(count, trace, **options, heap_overhead=x) for x in (0.0, HEAP_OVERHEAD))
    assert with_holes.workspace - without.workspace == int(HEAP_OVERHEAD * 0.5 * 2000)


def test_the_peak_of_the_backward_pass_by_hand():
    trace = ActivationTrace(blocks=(100, 100, 100, 100), outside=7, boundary=10)
    assert trace.peak(0) == 407
    assert trace.peak(1) == 7 + 4 * 10 + 100
    assert trace.peak(2) == 7 + 100 + 10 + 100 + 10 + 100  # blocks 0 and 2 kept, block 3 comes back
    assert [is_recomputed(index, 2) for index in range(4)] == [False, True, False, True]


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_a_note_says_whether_an_adapter_reaches_the_experts(tiny_config):
    from llamafactory.model.reach import reach_of

    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **WIDE}
    options = options_of("lora", {"lora_target": ("q_proj", "v_proj")})
    build = {"dtype": "float32", "attention": "sdpa", "finetuning_type": "lora", "options": options}
    reach = reach_of(build_skeleton(tiny_config("qwen3_moe", **changes), **build))
    assert reach.experts == 4 * 4 * 3 * 64 * 24  # blocks, experts, matrices, sizes
    assert reach.adapted_experts == 0 < reach.adapted < reach.matrices
    assert "none of those of the experts" in (reach.words() or "")
    everything = build | {"options": options_of("lora", {"lora_target": ("all",)})}
    assert "every expert" in (
        reach_of(build_skeleton(tiny_config("qwen3_moe", **changes), **everything)).words() or ""
    )
    assert reach_of(build_skeleton(tiny_config("llama", **WIDE), **build)).words() is None


def test_adapted_experts_are_reached(tiny_config):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamafactory.model.patches.peft_future_warning import without_future_warning
    from llamafactory.model.reach import reach_of

    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **WIDE}
    model: Any = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", **changes))
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with without_future_warning():
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    reach = reach_of(model)
    assert reach.adapted_experts == reach.experts == 4 * 4 * 3 * 64 * 24
    assert "reaches every expert" in (reach.words() or "")


def test_a_mixture_of_experts_is_traced_without_routing(tiny_config):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **WIDE}
    config = tiny_config("qwen3_moe", **changes)
    options = options_of("lora", {"lora_target": ("q_proj", "v_proj")})
    skeleton = build_skeleton(config, dtype="float32", attention="sdpa", finetuning_type="lora", options=options)
    one = trace_activations(skeleton, rows=1, lengths=(64,), is_flat=False)
    two = trace_activations(skeleton, rows=2, lengths=(64,), is_flat=False)
    assert two.peak(0) == pytest.approx(2 * one.peak(0), rel=0.05)
    real = real_model(config, "lora", {"lora_target": ("q_proj", "v_proj")}, "sdpa")
    ids = torch.ones(2, 64, dtype=torch.long)
    kept: dict[int, Any] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*real.parameters(), *real.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unwrap_peft(real).base_model(input_ids=ids, use_cache=False)
    assert two.peak(0) == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.15)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_changes_no_gradient(tiny_config, make_examples, every, use_reentrant):
    config = tiny_config("llama", **WIDE)
    batch = collate_flat(make_examples(LENGTHS))
    gradients = []
    for n in (0, every):
        model = real_model(config, "lora", {"lora_dropout": 0.2})
        assert recompute_blocks(model, n, use_reentrant=use_reentrant) == (4 // n if n else 0)
        torch.manual_seed(3)
        hidden_states(unwrap_peft(model), batch).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for before, after in zip(*gradients, strict=True):
        assert before is not None
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("method", "options"), [*METHODS, ("lora", {"use_dora": True}), ("lora", {"additional_target": ("lm_head",)})]
)
def test_parameters_are_counted_by_the_adapters_own_code(tiny_config, method, options):
    config = tiny_config("qwen2", **WIDE)
    skeleton = build_skeleton(
        config, dtype="float32", attention="segments", finetuning_type=method, options=options_of(method, options)
    )
    real = real_model(config, method, options)
    count, expected = count_parameters(skeleton), count_parameters(real)
    assert count == expected
    assert count.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sum(kind.num_parameters for kind in count.kinds) == count.trained
    assert count.base + count.adapter == sum(p.numel() for p in real.parameters())
