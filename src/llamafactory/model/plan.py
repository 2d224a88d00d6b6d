"""Every automatic decision about a run, each with its reason, made from the config and the hardware alone.

No weights are read. A key that the user set always wins; the plan then says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.costs import CostModel, Disk, Work, process_bytes_of
from llamafactory.model.family import Family, family_of
from llamafactory.model.memory import DEVICE_SHARE, MemoryForecast
from llamafactory.model.method import load_method
from llamafactory.model.precision import DType, Precision
from llamafactory.model.skeleton import ParameterCount
from llamafactory.model.workload import Workload, assumed_workload

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig

WorkloadOf: TypeAlias = Callable[["RunConfig", bool], Workload]
"""Configuration, and whether rows are padded -> the workload."""

CPU_MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass on a CPU: larger ones fall out of the cache, smaller ones starve the matrix products."""
GPU_MICRO_BATCH_TOKENS = 4096
"""Tokens below which a GPU is not filled: recomputing is cheaper than smaller passes."""
LOSS_CHUNK_ROWS = 256
"""Supervised rows whose logits exist at once: below 128 the GEMM starves, above 512 memory grows for nothing."""
RAM_SHARE = 0.9
"""Share of the free RAM that a run may take; the rest stays for the system's own needs."""
BLOCK_STEPS = (8, 6, 4, 3, 2, 1)
"""Every how many blocks one may be recomputed, from the least work to the least memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What the run costs, as far as it can be known before it starts.

    Attributes:
        memory: peak of one device, or of the process on a CPU.
        room: bytes that the run may take there.
        count: parameters.
        disk: what is written.
        work: arithmetic and time.
        largest_rows: tokens of each row of the largest micro-batch.
        source: where the row lengths come from.
    """

    memory: MemoryForecast
    room: int
    count: ParameterCount
    disk: Disk
    work: Work
    largest_rows: tuple[int, ...]
    source: str

    @property
    def fits(self) -> bool:
        """Whether the forecast is within the room."""
        return self.memory.total <= self.room


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """How this run uses the machine.

    Attributes:
        device: torch device type.
        weight_dtype: dtype of the loaded weights.
        autocast: mixed precision of accelerate.
        attention: name of the attention implementation.
        layout: `flat` lays rows end to end with attention inside each; `padded` right-pads rows of similar length.
        micro_batch_tokens: tokens of one forward pass (with padding in the padded layout); None keeps
            `per_device_train_batch_size` rows together. The optimizer step is the same either way.
        loss_chunk_rows: supervised rows whose logits exist at once.
        fused_head: head and cross-entropy on supervised rows only; else the model's own logits.
        fused_blocks: blocks through `model.kernels`, the fused CPU functions; else the model's own forward.
        checkpoint_every: every n-th block is recomputed in the backward pass; 1 all of them, 0 none.
        reasons: one line for each decision.
        costs: the forecast, or None where the model cannot be looked at without weights.
    """

    device: str
    weight_dtype: DType
    autocast: Literal["no", "bf16", "fp16"]
    attention: str
    layout: Literal["flat", "padded"]
    micro_batch_tokens: int | None
    loss_chunk_rows: int
    fused_head: bool
    fused_blocks: bool
    checkpoint_every: int
    reasons: Mapping[str, str]
    costs: Costs | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy for `run.json`; bytes, seconds, FLOPs."""
        document: dict[str, Any] = {**asdict(self), "reasons": dict(self.reasons)}
        if self.costs is not None:
            document["costs"]["memory"]["total"] = self.costs.memory.total
            document["costs"]["fits"] = self.costs.fits
        return document

    def lines(self) -> list[str]:
        """One line a decision, and one for the memory, for people."""
        lines = [f"{name} = {getattr(self, name)}: {reason}" for name, reason in self.reasons.items()]
        if self.costs is not None:
            parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.costs.memory.parts().items() if size)
            total, room = self.costs.memory.total / 1e9, self.costs.room / 1e9
            lines.append(f"memory = {total:.2f} GB of {room:.1f} GB: {parts}")
        return lines


def plan_training(
    cfg: RunConfig,
    model_config: PreTrainedConfig,
    hardware: Hardware,
    *,
    workload_of: WorkloadOf | None = None,
    rate: float | None = None,
    num_devices: int = 1,
    process_bytes: int | None = None,
) -> ModelPlan:
    """Decides how to train.

    Args:
        cfg: the resolved configuration.
        model_config: the model's transformers config.
        hardware: the machine.
        workload_of: the rows of a configuration; None assumes that each has `cutoff_len` tokens.
        rate: FLOP/s of one device in matrix products, for the time; None leaves the time out.
        num_devices: devices that train together.
        process_bytes: memory of the process beside the model; None looks at this process.

    Raises:
        ConfigError: a switch asks for what this model or machine cannot do.
    """
    family = family_of(model_config.model_type)
    reasons: dict[str, str] = {}
    if cfg.train.fp16 and hardware.device == "cpu":
        raise _refusal("fp16", "true", "float16 training needs a GPU, and this run is on a CPU", "fp16: false")
    weight_dtype, autocast, reasons["weight_dtype"] = _training_dtype(cfg)
    layout, attention, reasons["layout"] = _layout(cfg, model_config.model_type, family, hardware)
    is_plain = layout == "flat" and hardware.device == "cpu" and (weight_dtype, autocast) == ("float32", "no")
    fused_blocks, reasons["fused_blocks"] = _fused_blocks(cfg, model_config.model_type, family, is_plain)
    workload = (workload_of or _assumed(num_devices))(cfg, layout == "padded")
    chunk_rows = LOSS_CHUNK_ROWS if family.head is not None else None
    if process_bytes is None:
        process_bytes = process_bytes_of(hardware.device)
    try:
        model = CostModel(
            cfg,
            model_config,
            Precision(weights=weight_dtype, autocast=autocast, pure_bf16=cfg.train.pure_bf16),
            attention,
            is_fused=fused_blocks,
        )
        snapshot = model.snapshot(cfg, workload, hardware)

        def memory(limit: int | None, every: int) -> MemoryForecast:
            return model.memory(
                workload.largest(limit),
                is_flat=layout == "flat",
                every=every,
                chunk_rows=chunk_rows,
                process_bytes=process_bytes,
                snapshot_bytes=snapshot,
            )

        room = room_of(hardware, process_bytes)
        tokens, every, memory_reasons = _fit(cfg, workload, hardware, layout, room, memory)
        costs = Costs(
            memory=memory(tokens, every),
            room=room,
            count=model.count,
            disk=model.disk(cfg, workload, saves_adapter=load_method(cfg.train.finetuning_type).saves_adapter),
            work=model.work(workload, every=every, num_devices=num_devices, device=hardware.device, rate=rate),
            largest_rows=workload.largest(tokens).lengths,
            source=workload.source,
        )
    except ConfigError:
        raise
    except Exception as error:  # a model's own code, which may not run without values; the run itself does not need it
        costs = None
        tokens, every, memory_reasons = _blind(cfg, hardware, layout, f"{type(error).__name__}: {error}")
    reasons |= memory_reasons
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
        fused_blocks=fused_blocks,
        checkpoint_every=every,
        reasons=reasons,
        costs=costs,
    )


def inference_dtype(infer_dtype: str, checkpoint_dtype: str | None, hardware: Hardware) -> DType:
    """Dtype of the weights for chat: what was asked for, else what the checkpoint and the device are good at."""
    if infer_dtype != "auto":
        return infer_dtype  # type: ignore[return-value]
    if hardware.device == "cpu" or not hardware.has_bf16:
        return "float32"
    return "float16" if checkpoint_dtype == "float16" else "bfloat16"


def room_of(hardware: Hardware, process_bytes: int) -> int:
    """Bytes that a run may take: of a GPU's memory, or of the RAM that is free besides what it has already."""
    if hardware.device == "cpu":
        return int(hardware.memory_bytes * RAM_SHARE) + min(process_bytes, hardware.memory_bytes // 10)
    return int(hardware.memory_bytes * DEVICE_SHARE)


def _assumed(num_devices: int) -> WorkloadOf:
    def workload_of(cfg: RunConfig, is_padded: bool) -> Workload:
        return assumed_workload(
            row_tokens=cfg.data.cutoff_len,
            rows_per_device=cfg.train.per_device_train_batch_size,
            accumulation=cfg.train.gradient_accumulation_steps,
            num_devices=num_devices,
            num_steps=cfg.train.max_steps if cfg.train.max_steps > 0 else None,
        )

    return workload_of


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


def _fused_blocks(cfg: RunConfig, model_type: str, family: Family, is_plain: bool) -> tuple[bool, str]:
    """Whether blocks go through the fused CPU functions. At run time anything unusual in a module turns them off."""
    if not cfg.model.fused_kernels:
        return False, "fused_kernels: false"
    if not is_plain:
        return False, "they are for float32 rows laid end to end on a CPU"
    if not family.prenorm_blocks:
        return False, f"not proven for the blocks of model type {model_type!r}"
    return True, "norms, rotary, MLP and plain LoRA in few passes; equal to the model's own to 1e-5"


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
    return "padded", stock, f"right-padded batches of rows of similar length; {reason}"


def _fit(
    cfg: RunConfig,
    workload: Workload,
    hardware: Hardware,
    layout: str,
    room: int,
    memory: Callable[[int | None, int], MemoryForecast],
) -> tuple[int | None, int, dict[str, str]]:
    """The first way to run, from fast to small, whose forecast fits; the smallest one where none does."""
    fastest = _first_limit(cfg, workload, hardware, layout)
    forced = cfg.model.disable_gradient_checkpointing
    limit, every, found = fastest, 0, None
    for limit, every in _ways(fastest, workload, hardware, forced):
        found = memory(limit, every)
        if found.total <= room:
            break
    total = found.total if found else 0
    sizes = f"{total / 1e9:.1f} GB of {room / 1e9:.1f} GB"
    if forced is not None:
        checkpointing = f"disable_gradient_checkpointing: {str(forced).lower()} (set by you)"
    elif total > room:
        checkpointing = f"recompute every block, and it still needs {sizes}"
    elif not every:
        checkpointing = f"everything fits: {sizes}"
    else:
        which = "every block" if every == 1 else f"one block of {every}"
        checkpointing = f"recompute {which}, so that it fits: {sizes}"
    return (
        limit,
        every,
        {
            "micro_batch_tokens": _micro_batch_reason(cfg, layout, hardware, limit, fastest),
            "checkpoint_every": checkpointing,
        },
    )


def _ways(
    fastest: int | None, workload: Workload, hardware: Hardware, forced: bool | None
) -> Iterator[tuple[int | None, int]]:
    """Token limits and recomputation, from the fastest to the one that needs least memory."""
    start = fastest or sum(workload.largest(None).lengths)
    longest = max(workload.largest(1).lengths)
    floor = max(longest, 256 if hardware.device == "cpu" else GPU_MICRO_BATCH_TOKENS)
    smaller = _halves(start, floor)
    keeps: list[tuple[int | None, int]] = [(fastest, 0), *((limit, 0) for limit in smaller)]
    least = smaller[-1] if smaller else fastest
    recomputes: list[tuple[int | None, int]] = [(least, every) for every in BLOCK_STEPS]
    last: list[tuple[int | None, int]] = [(limit, 1) for limit in _halves(least or start, longest)]
    if forced is None:
        yield from [*keeps, *recomputes, *last]
    elif forced:
        yield from [*keeps, *((limit, 0) for limit, _ in last)]
    else:
        yield from [*((limit, 1) for limit, _ in keeps), *last]


def _halves(start: int, floor: int) -> list[int]:
    """`start` halved again and again, not below `floor`; `floor` itself is the last."""
    found = []
    while start // 2 >= floor:
        start //= 2
        found.append(start)
    if floor < start:
        found.append(floor)
    return found


def _first_limit(cfg: RunConfig, workload: Workload, hardware: Hardware, layout: str) -> int | None:
    if layout == "padded" or hardware.device != "cpu":
        return None
    return max(CPU_MICRO_BATCH_TOKENS, max(workload.largest(1).lengths))


def _micro_batch_reason(
    cfg: RunConfig, layout: str, hardware: Hardware, limit: int | None, fastest: int | None
) -> str:
    rows = cfg.train.per_device_train_batch_size
    if limit is None:
        return f"{rows} padded rows a pass" if layout == "padded" else f"{rows} rows laid end to end a pass"
    if limit != fastest:
        return "smaller passes, so that it fits; the optimizer step keeps its rows"
    if hardware.device == "cpu":
        return "a pass that stays near the caches; the optimizer step keeps its rows"
    return "the optimizer step keeps its rows"


def _blind(cfg: RunConfig, hardware: Hardware, layout: str, why: str) -> tuple[int | None, int, dict[str, str]]:
    """Safe choices where the model cannot be looked at."""
    forced = cfg.model.disable_gradient_checkpointing
    every = 1 if forced is None else int(not forced)
    limit = None
    if layout == "flat" and hardware.device == "cpu":
        limit = max(CPU_MICRO_BATCH_TOKENS, cfg.data.cutoff_len)
    reason = (
        f"no memory forecast for this model ({why[:160]}): recomputing is the safe choice"
        if forced is None
        else f"disable_gradient_checkpointing: {str(forced).lower()} (set by you)"
    )
    return (
        limit,
        every,
        {
            "micro_batch_tokens": _micro_batch_reason(cfg, layout, hardware, limit, limit),
            "checkpoint_every": reason,
        },
    )


def _refusal(key: str, given: str, message: str, fix: str) -> ConfigError:
    return ConfigError(Problem(key=key, given=given, message=message, fix=f"use {fix}"))
