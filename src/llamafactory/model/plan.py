"""Every automatic decision about a run, each with its reason, made from the config and the hardware alone.

No weights are read. A key that the user set always wins; the plan then says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.family import Family, family_of
from llamafactory.model.memory import activation_bytes, training_state_bytes
from llamafactory.model.method import load_method

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]

CPU_MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass on a CPU: larger ones fall out of the cache, smaller ones starve the matrix products."""
LOSS_CHUNK_ROWS = 256
"""Supervised rows whose logits exist at once: below 128 the GEMM starves, above 512 memory grows for nothing."""
MEMORY_SHARE = 0.6
"""Share of the free memory that activations may take before they are recomputed instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """How this run uses the machine.

    Attributes:
        device: torch device type.
        weight_dtype: dtype of the loaded weights.
        autocast: mixed precision of accelerate.
        attention: name of the attention implementation.
        layout: `flat` lays rows end to end with attention inside each; `padded` right-pads them.
        micro_batch_tokens: tokens of one forward pass in the flat layout; None keeps
            `per_device_train_batch_size` rows together. The optimizer step is the same either way.
        loss_chunk_rows: supervised rows whose logits exist at once.
        fused_head: head and cross-entropy on supervised rows only; else the model's own logits.
        activation_checkpointing: recompute activations in the backward pass.
        reasons: one line for each decision.
    """

    device: str
    weight_dtype: DType
    autocast: Literal["no", "bf16", "fp16"]
    attention: str
    layout: Literal["flat", "padded"]
    micro_batch_tokens: int | None
    loss_chunk_rows: int
    fused_head: bool
    activation_checkpointing: bool
    reasons: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy for `run.json`."""
        return {**asdict(self), "reasons": dict(self.reasons)}

    def lines(self) -> list[str]:
        """One line a decision, for people."""
        return [f"{name} = {getattr(self, name)}: {reason}" for name, reason in self.reasons.items()]


def plan_training(cfg: RunConfig, model_config: PreTrainedConfig, hardware: Hardware) -> ModelPlan:
    """Decides how to train.

    Args:
        cfg: the resolved configuration.
        model_config: the model's transformers config.
        hardware: the machine.

    Raises:
        ConfigError: a switch asks for what this model or machine cannot do.
    """
    family = family_of(model_config.model_type)
    reasons: dict[str, str] = {}
    if cfg.train.fp16 and hardware.device == "cpu":
        raise _refusal("fp16", "true", "float16 training needs a GPU, and this run is on a CPU", "fp16: false")
    weight_dtype, autocast, reasons["weight_dtype"] = _training_dtype(cfg)
    layout, attention, reasons["layout"] = _layout(cfg, model_config.model_type, family, hardware)
    tokens, reasons["micro_batch_tokens"] = _micro_batch(cfg, layout, hardware)
    checkpointing, reasons["activation_checkpointing"] = _checkpointing(cfg, model_config, hardware, tokens)
    reasons["fused_head"] = (
        "logits of supervised rows only, in chunks"
        if family.head is not None
        else f"the head of model type {model_config.model_type!r} is not known"
    )
    return ModelPlan(
        device=hardware.device,
        weight_dtype=weight_dtype,
        autocast=autocast,
        attention=attention,
        layout=layout,
        micro_batch_tokens=tokens,
        loss_chunk_rows=LOSS_CHUNK_ROWS,
        fused_head=family.head is not None,
        activation_checkpointing=checkpointing,
        reasons=reasons,
    )


def inference_dtype(infer_dtype: str, checkpoint_dtype: str | None, hardware: Hardware) -> DType:
    """Dtype of the weights for chat: what was asked for, else what the checkpoint and the device are good at."""
    if infer_dtype != "auto":
        return infer_dtype  # type: ignore[return-value]
    if hardware.device == "cpu" or not hardware.has_bf16:
        return "float32"
    return "float16" if checkpoint_dtype == "float16" else "bfloat16"


def _training_dtype(cfg: RunConfig) -> tuple[DType, Literal["no", "bf16", "fp16"], str]:
    train = cfg.train
    if train.pure_bf16:
        return "bfloat16", "no", "pure_bf16: weights and arithmetic in bf16"
    if not train.bf16 and not train.fp16:
        return "float32", "no", "neither bf16 nor fp16 is set"
    autocast: Literal["bf16", "fp16"] = "bf16" if train.bf16 else "fp16"
    if load_method(train.finetuning_type).trains_base:
        return "float32", autocast, f"fp32 master weights, arithmetic in {autocast}"
    return ("bfloat16" if train.bf16 else "float16"), autocast, f"frozen base in {autocast}, adapters in fp32"


def _layout(
    cfg: RunConfig, model_type: str, family: Family, hardware: Hardware
) -> tuple[Literal["flat", "padded"], str, str]:
    choice = cfg.model.flash_attn
    packs = bool(cfg.data.packing or cfg.data.neat_packing)
    stock = {"disabled": "eager", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}.get(choice, "sdpa")
    if choice in ("fa2", "fa3") and hardware.device != "cuda":
        raise _refusal(
            "flash_attn", choice, f"needs a CUDA device; this run is on {hardware.device}", "flash_attn: auto"
        )
    if choice in ("auto", "sdpa") and family.segments:
        return "flat", "segments", "rows lie end to end, one attention call a row: no padding, no leaking"
    if packs:
        why = f"flash_attn {choice}" if family.segments else f"model type {model_type!r}"
        raise _refusal("packing", "true", f"packing has no proven leak-free path with {why}", "packing: false")
    reason = (
        f"flash_attn: {choice}" if family.segments else f"model type {model_type!r} has no proven padding-free path"
    )
    return "padded", stock, f"right-padded batches; {reason}"


def _micro_batch(cfg: RunConfig, layout: str, hardware: Hardware) -> tuple[int | None, str]:
    if layout == "padded":
        return None, f"{cfg.train.per_device_train_batch_size} padded rows a pass"
    if hardware.device == "cpu":
        tokens = max(CPU_MICRO_BATCH_TOKENS, cfg.data.cutoff_len)
        return tokens, "a pass that stays near the caches; the optimizer step keeps its rows"
    return None, f"{cfg.train.per_device_train_batch_size} rows laid end to end a pass"


def _checkpointing(
    cfg: RunConfig, model_config: PreTrainedConfig, hardware: Hardware, tokens: int | None
) -> tuple[bool, str]:
    if cfg.model.disable_gradient_checkpointing is not None:
        value = cfg.model.disable_gradient_checkpointing
        return not value, f"disable_gradient_checkpointing: {str(value).lower()}"
    width = tokens or cfg.train.per_device_train_batch_size * cfg.data.cutoff_len
    needed = activation_bytes(model_config, width)
    state = training_state_bytes(model_config, full=load_method(cfg.train.finetuning_type).trains_base)
    if needed is None or state is None:
        return True, f"no memory model for {model_config.model_type!r}: recomputing is the safe choice"
    room = max(0, hardware.memory_bytes - state) * MEMORY_SHARE
    sizes = f"{needed / 2**30:.1f} GiB of activations for {width} tokens, {room / 2**30:.1f} GiB of room"
    return (needed > room), f"{sizes}: {'recompute' if needed > room else 'keep them'}"


def _refusal(key: str, given: str, message: str, fix: str) -> ConfigError:
    return ConfigError(Problem(key=key, given=given, message=message, fix=f"use {fix}"))
