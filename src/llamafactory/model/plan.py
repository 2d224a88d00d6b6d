"""Every automatic decision about a run, each with its reason, made from the config and the hardware alone.

No weights are read. A key that the user set always wins; the plan then says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.hparams.sharding import sharding_of
from llamafactory.model.costs import CostModel, Disk, Work, process_bytes_of
from llamafactory.model.demands import NOTHING_MORE, Demands
from llamafactory.model.family import family_of
from llamafactory.model.fit import fit, fit_blindly, require_room_for_longest, room_of
from llamafactory.model.layout import NOT_PLAIN, choose_blocks, choose_layout, compile_reason, refusal
from llamafactory.model.loader import adapter_folders
from llamafactory.model.memory import MemoryForecast
from llamafactory.model.method import load_method
from llamafactory.model.precision import DType, Precision, training_dtype
from llamafactory.model.skeleton import ParameterCount
from llamafactory.model.workload import Part, Workload, assumed_workload

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig

WorkloadOf: TypeAlias = Callable[["RunConfig", bool], Workload]
"""Configuration, and whether rows are padded -> the workload."""

LOSS_CHUNK_ROWS = 256
"""Supervised rows whose logits exist at once: below 128 the GEMM starves, above 512 memory grows for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What the run costs, as far as it can be known before it starts.

    Attributes:
        memory: peak of one device, or of the process on a CPU.
        room: bytes that the run may take there.
        count: parameters.
        disk: what is written.
        work: arithmetic and time.
        largest_rows: tokens of each row of the largest micro-batch, or of its prefix trees.
        source: where the row lengths come from.
        notes: what a person should know besides.
    """

    memory: MemoryForecast
    room: int
    count: ParameterCount
    disk: Disk
    work: Work
    largest_rows: tuple[Part, ...]
    source: str
    notes: tuple[str, ...] = ()

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
        fused_blocks: blocks may go through `model.kernels`, the fused CPU functions; else the model's own forward.
        checkpoint_every: every n-th block is recomputed in the backward pass; 1 all of them, 0 none.
        compiled_blocks: the model's own blocks through torch.compile.
        sharding: `full_shard`, `shard_grad_op`, or `none` where each process holds the whole model.
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
    compiled_blocks: bool = False
    sharding: str = "none"
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
            lines += [f"note: {note}" for note in self.costs.notes]
        return lines


def plan_training(
    cfg: RunConfig,
    model_config: PreTrainedConfig,
    hardware: Hardware,
    *,
    workload_of: WorkloadOf | None = None,
    demands_of: Callable[[RunConfig], Demands] = lambda cfg: NOTHING_MORE,
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
        demands_of: what the stage of a configuration takes besides the policy's own pass.
        rate: FLOP/s of one device in matrix products, for the time; None leaves the time out.
        num_devices: devices that train together.
        process_bytes: memory of the process beside the model; None looks at this process.

    Raises:
        ConfigError: a switch asks for what this model or machine cannot do.
        LlamaFactoryError: an adapter that is continued cannot be found.
    """
    family = family_of(model_config.model_type)
    reasons: dict[str, str] = {}
    if cfg.train.fp16 and hardware.device == "cpu":
        raise refusal("fp16", "true", "float16 training needs a GPU, and this run is on a CPU", "fp16: false")
    weight_dtype, autocast, reasons["weight_dtype"] = training_dtype(cfg)
    layout, attention, reasons["layout"] = choose_layout(cfg, model_config, family, hardware)
    is_plain = layout == "flat" and hardware.device == "cpu" and (weight_dtype, autocast) == ("float32", "no")
    num_shards = num_devices if sharding_of(cfg) else 1
    sharding, why = _choose_sharding(cfg, num_shards)
    reasons |= why
    fused_blocks, reasons["fused_blocks"] = choose_blocks(
        cfg, model_config.model_type, family, is_plain, is_sharded=num_shards > 1
    )
    workload = (workload_of or _assumed(num_devices))(cfg, layout == "padded")
    compiled_blocks = cfg.train.compiles and not fused_blocks
    if cfg.train.compiles:
        reasons["compiled_blocks"] = compile_reason(cfg, fused_blocks)
    adapters = adapter_folders(cfg.model)
    require_room_for_longest(cfg, workload)
    loss_chunk_rows = cfg.train.loss_chunk_size or LOSS_CHUNK_ROWS
    if cfg.train.loss_chunk_size is not None:
        reasons["loss_chunk_rows"] = "loss_chunk_size (set by you)"
    chunk_rows = loss_chunk_rows if family.head is not None else None
    if process_bytes is None:
        process_bytes = process_bytes_of(hardware.device)
    try:
        model = CostModel(
            cfg,
            model_config,
            Precision(weights=weight_dtype, autocast=autocast, pure_bf16=cfg.train.pure_bf16),
            attention,
            is_fused=fused_blocks,
            demands=demands_of(cfg),
            adapters=adapters,
            num_shards=num_shards,
        )
        if fused_blocks and not model.trains_fused:
            reasons["fused_blocks"] = NOT_PLAIN
            if cfg.train.compiles:
                compiled_blocks, reasons["compiled_blocks"] = True, compile_reason(cfg, False)
        snapshot = model.snapshot(cfg, workload, hardware)

        def memory(limit: int | None, every: int) -> MemoryForecast:
            return model.memory(
                workload.largest(limit),
                device=hardware.device,
                is_flat=layout == "flat",
                every=every,
                chunk_rows=chunk_rows,
                process_bytes=process_bytes,
                snapshot_bytes=snapshot,
            )

        room = room_of(hardware, process_bytes)
        tokens, every, memory_reasons = fit(cfg, workload, hardware, layout, room, memory)
        costs = Costs(
            memory=memory(tokens, every),
            room=room,
            count=model.count,
            disk=model.disk(cfg, workload, saves_adapter=load_method(cfg.train.finetuning_type).saves_adapter),
            work=model.work(workload, every=every, num_devices=num_devices, device=hardware.device, rate=rate),
            largest_rows=workload.largest(tokens).lengths,
            source=workload.source,
            notes=model.notes,
        )
    except LlamaFactoryError:
        raise
    except Exception as error:  # a model's own code, which may not run without values; the run itself does not need it
        costs = None
        tokens, every, memory_reasons = fit_blindly(cfg, hardware, layout, f"{type(error).__name__}: {error}")
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
        loss_chunk_rows=loss_chunk_rows,
        fused_head=family.head is not None,
        fused_blocks=fused_blocks,
        checkpoint_every=every,
        compiled_blocks=compiled_blocks,
        sharding=sharding,
        reasons=reasons,
        costs=costs,
    )


def _choose_sharding(cfg: RunConfig, num_shards: int) -> tuple[str, dict[str, str]]:
    """How the model is spread, and why, where that was asked for."""
    asked = sharding_of(cfg)
    if asked is None:
        return "none", {}
    if num_shards == 1:
        return "none", {"sharding": f"there is one process, and so nothing to spread; {asked.source}"}
    return asked.words, {"sharding": f"over {num_shards} processes; {asked.source}"}


def inference_dtype(infer_dtype: str, checkpoint_dtype: str | None, hardware: Hardware) -> DType:
    """Dtype of the weights for chat: what was asked for, else what the checkpoint and the device are good at."""
    if infer_dtype != "auto":
        return infer_dtype  # type: ignore[return-value]
    if hardware.device == "cpu" or not hardware.has_bf16:
        return "float32"
    return "float16" if checkpoint_dtype == "float16" else "bfloat16"


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
