"""How rows lie in a batch, which attention goes with that, and whether blocks run through the fused CPU functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.hparams.sharding import sharding_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.family import Family


NOT_PLAIN = "where every module is plain; in training some are not (dropout, DoRA): the model's own forward"
"""Why blocks of a run go through the model's own forward while it trains, though they may be fused elsewhere."""


def choose_layout(
    cfg: RunConfig, model_config: PreTrainedConfig, family: Family, hardware: Hardware
) -> tuple[Literal["flat", "padded"], str, str]:
    """Layout, name of the attention implementation, and the reason.

    Args:
        cfg: the resolved configuration.
        model_config: the model's config.
        family: what is known about its type.
        hardware: the machine.

    Raises:
        ConfigError: a switch asks for what this model or machine cannot do.
    """
    choice, model_type = cfg.model.flash_attn, model_config.model_type
    packs = bool(cfg.data.packing or cfg.data.neat_packing)
    if choice in ("fa2", "fa3") and hardware.device != "cuda":
        raise refusal(
            "flash_attn", choice, f"needs a CUDA device; this run is on {hardware.device}", "flash_attn: auto"
        )
    if choice in ("auto", "sdpa") and family.segments:
        return "flat", "segments", "rows lie end to end, one attention call a row: no padding, no leaking"
    if packs:
        why = f"flash_attn {choice}" if family.segments else f"model type {model_type!r}"
        raise refusal("packing", "true", f"packing has no proven leak-free path with {why}", "packing: false")
    stock = stock_attention(model_config)
    if choice == "sdpa" and stock != "sdpa":
        raise refusal("flash_attn", choice, f"model type {model_type!r} has no SDPA attention", "flash_attn: auto")
    asked = {"disabled": "eager", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}.get(choice, stock)
    reason = (
        f"flash_attn: {choice}" if family.segments else f"model type {model_type!r} has no proven padding-free path"
    )
    if choice == "auto" and stock == "eager":
        reason += "; eager attention, because it has no SDPA attention either"
    return "padded", asked, f"right-padded batches of rows of similar length; {reason}"


def stock_attention(model_config: PreTrainedConfig) -> Literal["sdpa", "eager"]:
    """What transformers itself runs this model with: SDPA, or eager where its class refuses that (caps, ALiBi)."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    found: Any = mapping[type(model_config)] if type(model_config) in mapping else None
    kind = found[0] if isinstance(found, tuple) else found
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def choose_blocks(
    cfg: RunConfig, model_type: str, family: Family, is_plain: bool, is_sharded: bool = False
) -> tuple[bool, str]:
    """Whether blocks may go through the fused CPU functions: everything that is known before the modules are there.

    What a module holds decides where it runs (`kernels.decoder.read_blocks`), also for the forecast.
    """
    if not cfg.model.fused_kernels:
        return False, "fused_kernels: false"
    if is_sharded:
        return False, "fsdp (or deepspeed) gathers the weights of a block where its own forward is called"
    if not is_plain:
        return False, "they are for float32 rows laid end to end on a CPU"
    if not family.prenorm_blocks:
        return False, f"not proven for the blocks of model type {model_type!r}"
    return True, "norms, rotary, MLP and plain LoRA in few passes; equal to the model's own to 1e-5"


def compile_reason(cfg: RunConfig, fused_blocks: bool) -> str:
    """What becomes of `torch_compile`, in words.

    Raises:
        ConfigError: beside sharded weights.
    """
    if sharding_of(cfg):
        raise refusal(
            "torch_compile",
            "true",
            "compiled blocks are not proven together with fsdp or deepspeed",
            "torch_compile: false",
        )
    if fused_blocks:
        return "the fused CPU functions take their place; fused_kernels: false compiles the model's own blocks"
    return "block by block, once for all lengths (dynamic sizes); the memory forecast is that of uncompiled blocks"


def refusal(key: str, given: str, message: str, fix: str) -> ConfigError:
    """The error of one key whose value cannot be used here."""
    return ConfigError(Problem(key=key, given=given, message=message, fix=f"use {fix}"))
