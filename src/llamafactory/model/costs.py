"""What a run costs, from its config and the machine: memory by part, disk, arithmetic and time. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llamafactory.model.demands import NOTHING_MORE, Demands
from llamafactory.model.kernels.decoder import read_blocks
from llamafactory.model.memory import (
    HEAP_OVERHEAD,
    Generation,
    HeadShape,
    MemoryForecast,
    StepShape,
    forecast_memory,
    optimizer_state_bytes,
    spread_over,
)
from llamafactory.model.reach import reach_of
from llamafactory.model.reference import without_dropout
from llamafactory.model.skeleton import ParameterCount, build_skeleton, count_parameters, decoder_blocks
from llamafactory.model.trace import ActivationTrace, base_of, trace_activations
from llamafactory.model.valuehead import ModelWithValueHead, ValueHead
from llamafactory.model.workload import Part, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.precision import Precision
    from llamafactory.model.workload import MicroBatch, Workload

GPU_PROCESS_BYTES = 800 * 2**20
"""Context, libraries and their work space on a GPU."""
CPU_LIBRARY_BYTES = 120 * 2**20
"""What the first step adds to a process on a CPU: kernels, scratch memory of the matrix library, thread stacks."""
UTILISATION = {"cpu": 0.5}
OTHER_UTILISATION = 0.4
"""Share of the matrix rate that a training step is assumed to reach."""
SAMPLING_UTILISATION = 0.1
"""Share that sampling is assumed to reach: a token at a time, weights are read more than they are multiplied."""
CACHE_ROOM = 128
"""Places that the generator's cache has behind the last token, at most."""
GENERATION_LOGITS_COPIES = 4
"""Float32 copies of the last logits while a token is chosen: scaled, sorted, probabilities, their sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: one checkpoint.
        num_checkpoints: how many lie there at once, or None where the number of steps is not known.
        result: the final weights.
        export: the merged model in bfloat16.
        cache: the tokenised rows, or None where their number is not known.
    """

    checkpoint: int
    num_checkpoints: int | None
    result: int
    export: int
    cache: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Arithmetic and time.

    Attributes:
        step_flops: floating-point operations of an optimizer step over all devices, recomputation included.
        step_seconds: of one step, or None where no rate is known.
        run_seconds: of all steps, or None.
        rate: FLOP/s of one device that the seconds are based on.
        utilisation: share of that rate that is assumed.
        sampling_flops: those of `step_flops` that sample answers, at a share of their own.
    """

    step_flops: float
    step_seconds: float | None
    run_seconds: float | None
    rate: float | None
    utilisation: float
    sampling_flops: float = 0.0


class CostModel:
    """Counts and traces of one model with one method; asks for different batches cost a trace each."""

    def __init__(
        self,
        cfg: RunConfig,
        config: PreTrainedConfig,
        precision: Precision,
        attention: str,
        *,
        is_fused: bool = False,
        demands: Demands = NOTHING_MORE,
        adapters: tuple[Path, ...] = (),
        num_shards: int = 1,
    ) -> None:
        """Builds the model on the meta device.

        Args:
            cfg: the resolved configuration.
            config: the model's config.
            precision: number formats.
            attention: name of the attention implementation.
            is_fused: blocks go through `model.kernels` where every module is plain.
            demands: of the stage.
            adapters: folders of trained adapters.
            num_shards: processes over which weights, gradients and optimizer are spread.

        Raises:
            Exception: whatever the model's own code raises there.
        """
        self._precision = precision
        self._num_shards = num_shards
        self._skeleton = build_skeleton(
            config,
            dtype=precision.weights,
            attention=attention,
            finetuning_type=cfg.train.finetuning_type,
            options=cfg.adapter_options,
            adapters=adapters,
            pure_bf16=precision.pure_bf16,
            trust_remote_code=cfg.model.trust_remote_code,
        )
        if demands.drops_nothing:
            without_dropout(self._skeleton)
        self.trains_fused = is_fused and read_blocks(base_of(self._skeleton)) is not None
        self._demands = demands
        whole = self._skeleton
        if demands.has_value_head:
            with torch.device("meta"):
                whole = ModelWithValueHead(whole, ValueHead(config.get_text_config().hidden_size))
        self.count: ParameterCount = count_parameters(whole)
        self.notes = tuple(words for words in [reach_of(self._skeleton).words()] if words)
        self._optimizer = optimizer_state_bytes(
            cfg.train.optim,
            [(tuple(p.shape), p.element_size()) for p in whole.parameters() if p.requires_grad],
        )
        self._head = _head_of(self._skeleton)
        self._linear = _linear_parameters(self._skeleton, config)
        self._attention_width = _attention_width(config)
        self._cache_width = _cache_width(config)
        self._casts = self._cast_copies()
        self.trace = cache(self._trace)

    def memory(
        self,
        batch: MicroBatch,
        *,
        device: str,
        is_flat: bool,
        every: int,
        chunk_rows: int | None,
        process_bytes: int,
        snapshot_bytes: int,
    ) -> MemoryForecast:
        """The peak of a run whose largest micro-batch is `batch`."""
        lengths: tuple[Part, ...] = batch.lengths if is_flat else (_padded(max(map(tokens_of, batch.lengths))),)
        rows = 1 if is_flat else len(batch.lengths)
        trace = self.trace(rows, lengths, is_flat)
        whole = forecast_memory(
            self.count,
            trace,
            step=StepShape(
                tokens=rows * sum(map(tokens_of, lengths)),
                targets=batch.targets,
                num_micro_batches=batch.num_micro_batches,
            ),
            head=HeadShape(
                vocab=self._head[0],
                width=self._head[1],
                is_trained=self._head[2],
                chunk_rows=chunk_rows,
                element_bytes=4 if self._precision.compute == "float32" else 2,
                is_run=self._demands.makes_logits,
            ),
            every=every,
            optimizer_bytes=self._optimizer,
            process_bytes=process_bytes,
            cast_copies=self._casts,
            snapshot_bytes=snapshot_bytes,
            heap_overhead=HEAP_OVERHEAD if device == "cpu" and not trace.is_fused else 0.0,
            reference_bytes=self._reference_bytes(),
            generation=self._generation(trace, tokens=rows * sum(map(tokens_of, lengths))),
        )
        head_bytes = self._head[0] * self._head[1] * 4
        return spread_over(whole, self._num_shards, self.count, outer_bytes=2 * head_bytes)

    def _reference_bytes(self) -> int:
        demands, element = self._demands, 4 if self._precision.weights == "float32" else 2
        if demands.reference_bytes is not None:
            return demands.reference_bytes
        if demands.reference == "copy":
            return element * (
                self.count.base if demands.reference_parameters is None else demands.reference_parameters
            )
        return 4 * self.count.adapter if demands.reference == "adapter" else 0

    def _generation(self, trace: ActivationTrace, *, tokens: int) -> Generation | None:
        """What sampling answers holds: the cache with its room, the last logits, a block while prompts are read."""
        sampling = self._demands.sampling
        if sampling is None:
            return None
        element = 4 if self._precision.compute == "float32" else 2
        places = sampling.prompt_tokens + sampling.new_tokens + CACHE_ROOM
        prompts = -(-sampling.rows // sampling.group_size)
        return Generation(
            cache=2 * self._cache_width * element * sampling.rows * places,
            logits=GENERATION_LOGITS_COPIES * 4 * self._head[0] * sampling.rows,
            activations=int(max(trace.blocks, default=0) / max(1, tokens) * prompts * sampling.prompt_tokens),
        )

    def work(self, workload: Workload, *, every: int, num_devices: int, device: str, rate: float | None) -> Work:
        """Arithmetic of a step and time of the run, at the assumed share of the rate."""
        blocks = len(self.count.trained_by_block)
        again = 0.0 if not every else (blocks // every) / max(1, blocks)
        forward = 2 * workload.tokens * self._linear["blocks"] + 2 * workload.squares * self._attention_width
        backward = forward + 2 * workload.squares * self._attention_width * 0.5
        weight_gradients = 2 * workload.tokens * self._linear["trained"]
        demands = self._demands
        head = 2 * workload.targets * self._head[0] * self._head[1] if demands.makes_logits else 0
        flops = forward * (1 + again) + backward + weight_gradients + head * (3 if self._head[2] else 2)
        flops += demands.passes * (forward + head)
        sampled = self._sampling_flops(workload)
        share = UTILISATION.get(device, OTHER_UTILISATION)
        seconds = None if not rate else (flops / share + sampled / SAMPLING_UTILISATION) / (rate * num_devices)
        total = None if seconds is None or workload.num_steps is None else seconds * workload.num_steps
        return Work(
            step_flops=flops + sampled, step_seconds=seconds, run_seconds=total, rate=rate, utilisation=share,
            sampling_flops=sampled,
        )  # fmt: skip

    def _sampling_flops(self, workload: Workload) -> float:
        """Of the answers of a step: their tokens one by one, their prompts once for a rollout."""
        sampling = self._demands.sampling
        if sampling is None:
            return 0.0
        answers = workload.targets / sampling.new_tokens
        read = answers / sampling.group_size * sampling.prompt_tokens
        attended = workload.targets * (sampling.prompt_tokens + sampling.new_tokens / 2)
        made = workload.targets * (self._linear["blocks"] + self._head[0] * self._head[1])
        flops = 2 * (made + read * self._linear["blocks"]) + 4 * attended * self._attention_width
        return flops / sampling.num_epochs

    def snapshot(self, cfg: RunConfig, workload: Workload, hardware: Hardware) -> int:
        """Bytes of the copy that a checkpoint is written from while training goes on, in the RAM of a CPU run.

        On a GPU it lies in the RAM too, and so takes nothing of the device.
        """
        train = cfg.train
        size = self.count.trained_bytes + (0 if train.save_only_model else self._optimizer)
        is_async = train.async_save if train.async_save is not None else size < hardware.ram_available_bytes * 0.5
        if hardware.device != "cpu" or train.save_strategy == "no" or not is_async:
            return 0
        if workload.num_steps is not None and train.save_strategy == "steps":
            every = train.save_steps if train.save_steps >= 1 else train.save_steps * workload.num_steps
            return size if every < workload.num_steps else 0  # after the last step nothing else is alive
        return size

    def disk(self, cfg: RunConfig, workload: Workload, *, saves_adapter: bool) -> Disk:
        """Bytes that the run and its export leave behind."""
        train = cfg.train
        sampling = self._demands.sampling
        result = self.count.trained_bytes if saves_adapter else self.count.weight_bytes
        optimizer = 0 if train.save_only_model else self._optimizer
        return Disk(
            checkpoint=result + optimizer + (0 if sampling is None else sampling.kept_bytes),
            num_checkpoints=_num_checkpoints(cfg, workload.num_steps),
            result=result,
            export=2 * self.count.base,
            cache=None if workload.num_tokens is None else 8 * workload.num_tokens,
        )

    def _trace(self, rows: int, lengths: tuple[Part, ...], is_flat: bool) -> ActivationTrace:
        return trace_activations(
            self._computing, rows=rows, lengths=lengths, is_flat=is_flat, is_fused=self.trains_fused
        )

    @property
    def _computing(self) -> nn.Module:
        """The model in the dtype it computes in: autocast makes low-precision results of every matrix product."""
        if self._precision.autocast == "no":
            return self._skeleton
        for parameter in self._skeleton.parameters():
            parameter.data = parameter.data.to(getattr(torch, self._precision.compute))
        return self._skeleton

    def _cast_copies(self) -> int:
        """Autocast keeps a two-byte copy of each float32 matrix of the forward pass for the backward pass."""
        if self._precision.autocast == "no":
            return 0
        return sum(2 * p.numel() for p in self._skeleton.parameters() if p.dim() >= 2 and p.element_size() == 4)


def process_bytes_of(device: str) -> int:
    """What a process takes beside the model: on a CPU what this one has now, and what the first step will add."""
    if device != "cpu":
        return GPU_PROCESS_BYTES
    from llamafactory.extras.hardware import read_process_memory

    return read_process_memory()[0] + CPU_LIBRARY_BYTES


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _head_of(model: Any) -> tuple[int, int, bool]:
    """Rows and columns of the output head, and whether its weight is trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = base.get_output_embeddings().weight
    return weight.shape[0], weight.shape[1], weight.requires_grad


def _linear_parameters(model: nn.Module, config: PreTrainedConfig) -> dict[str, float]:
    """Weights that a token meets inside the blocks, in all and those with gradients; of the experts its share."""
    text: Any = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    found = {"blocks": 0.0, "trained": 0.0}
    for block in decoder_blocks(model):
        for name, parameter in block.named_parameters():
            if parameter.dim() < 2:
                continue
            is_routed = parameter.dim() == 3 or ".experts." in name
            number = parameter.numel() * (share if is_routed else 1.0)
            found["blocks"] += number
            found["trained"] += number if parameter.requires_grad else 0.0
    return found


def _attention_width(config: PreTrainedConfig) -> int:
    """Layers x heads x head size; a causal forward pass does 2 FLOPs for each of them and squared length."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return (getattr(text, "num_hidden_layers", None) or 0) * heads * size


def _cache_width(config: PreTrainedConfig) -> int:
    """Layers x key/value heads x head size: numbers of a token among the keys, and as many among the values."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    kept = getattr(text, "num_key_value_heads", None) or heads
    return (getattr(text, "num_hidden_layers", None) or 0) * kept * size


def _num_checkpoints(cfg: RunConfig, num_steps: int | None) -> int | None:
    train = cfg.train
    if train.save_strategy == "no":
        return 0
    if train.save_total_limit:
        return train.save_total_limit
    if num_steps is None:
        return None
    if train.save_strategy == "epoch":
        return max(1, round(train.num_train_epochs))
    every = train.save_steps if train.save_steps >= 1 else max(1, round(train.save_steps * num_steps))
    return max(1, int(-(-num_steps // every)))


def costs_to_dict(memory: MemoryForecast, disk: Disk, work: Work) -> dict[str, Any]:
    """Everything as JSON-able numbers (bytes, seconds, FLOPs)."""
    return {"memory": memory.to_dict(), "disk": asdict(disk), "work": asdict(work)}
