"""Bytes of a training step, part by part, from counts and traces. Pure arithmetic: no model, no device, no file.

The peak of a step is the larger of two moments: the end of the forward pass, when everything that autograd keeps is
alive together with a chunk of logits; and the end of the backward pass, when every gradient is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamafactory.model.skeleton import ParameterCount
from llamafactory.model.trace import ActivationTrace, is_recomputed

LOGITS_COPIES = 2
"""Float32 copies of a chunk of logits that the fused head has at once: the logits, and one temporary."""
UNFUSED_LOGITS_COPIES = 3
"""Copies of all supervised logits without the fused head: logits, their float32 form or log-softmax, the gradient."""
HEAP_OVERHEAD = 0.65
"""Holes in the heap of a CPU process, as a share of the activations kept by a model's own forward pass.

Its many temporaries lie between the tensors that are kept. glibc does not fill a hole with an aligned tensor of the
same size, so the heap grows; with every tensor mapped by itself the holes are gone, at twice the CPU time. Measured:
0.55 to 0.87 of the kept bytes for eager, SDPA and segment attention. The fused blocks have few temporaries."""
DEVICE_SHARE = 0.94
"""Share of a GPU's memory that is usable: the rest goes to fragmentation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What of a batch matters for memory.

    Attributes:
        tokens: positions of the largest micro-batch, padding included.
        targets: its supervised tokens, at most.
        num_micro_batches: most micro-batches of one optimizer step on one device.
    """

    tokens: int
    targets: int
    num_micro_batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShape:
    """What of the output head matters for memory.

    Attributes:
        vocab: rows of the head.
        width: hidden size.
        is_trained: its weight gets a gradient (accumulated in float32).
        chunk_rows: supervised rows whose logits exist at once; None without the fused head.
        element_bytes: bytes of an element of the hidden states.
        is_run: False for a stage that scores answers with a value head alone.
    """

    vocab: int
    width: int
    is_trained: bool
    chunk_rows: int | None
    element_bytes: int
    is_run: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Bytes that sampling answers holds at its peak.

    Attributes:
        cache: keys and values.
        logits: of the last position of each answer, and copies while a token is chosen.
        activations: of a block while the prompts are read.
    """

    cache: int
    logits: int
    activations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryForecast:
    """Peak bytes of one device (or of this process on a CPU), by part. The sum is the forecast.

    Attributes:
        process: interpreter, libraries and data; on a GPU the context and the libraries' work space.
        weights: of the model, with adapters and buffers.
        gradients: of trained parameters, as many as are alive at the peak.
        optimizer: its state.
        activations: what autograd keeps, at the peak.
        logits: of the chunk that is computed, and what the loss keeps.
        reference: a second model, or a frozen copy of the adapter.
        cache: keys and values of answers while they are sampled; it is gone when the policy is trained.
        checkpoint: the copy that is written to disk while training goes on.
        workspace: temporaries of the backward pass, cast copies, and what the allocator holds back.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int
    cache: int
    checkpoint: int
    workspace: int

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(asdict(self).values())

    @property
    def largest(self) -> str:
        """Name of the part that takes most."""
        return max(asdict(self).items(), key=lambda item: item[1])[0]

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return asdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Parts and total, in bytes."""
        return {**asdict(self), "total": self.total}


def forecast_memory(
    count: ParameterCount,
    trace: ActivationTrace,
    *,
    step: StepShape,
    head: HeadShape,
    every: int,
    optimizer_bytes: int,
    process_bytes: int,
    cast_copies: int = 0,
    snapshot_bytes: int = 0,
    heap_overhead: float = 0.0,
    reference_bytes: int = 0,
    generation: Generation | None = None,
) -> MemoryForecast:
    """Adds up the peak of an optimizer step.

    Args:
        count: parameters.
        trace: activations of the largest micro-batch.
        step: the largest micro-batch.
        head: the output head.
        every: every `every`-th block is recomputed; 0 for none.
        optimizer_bytes: state of the optimizer.
        process_bytes: before the model is loaded.
        cast_copies: bytes of low-precision copies of trained weights that autocast keeps.
        snapshot_bytes: copy of weights and optimizer that is written while training goes on.
        heap_overhead: holes between kept activations, as a share of them; see `HEAP_OVERHEAD`.
        reference_bytes: of a second model or adapter.
        generation: what sampling answers holds, or None.
    """
    logits = _logits_bytes(step, head)
    moments = [
        (*moment, 0) for moment in _moments(count, trace, every, logits, keeps_gradients=step.num_micro_batches > 1)
    ]
    if generation is not None:
        moments.append((0, generation.activations, generation.logits, generation.cache))
    gradients, activations, logits, cache = max(moments, key=sum)
    return MemoryForecast(
        process=process_bytes,
        weights=count.weight_bytes + count.buffer_bytes,
        gradients=gradients,
        optimizer=optimizer_bytes,
        activations=activations,
        logits=logits,
        reference=reference_bytes,
        cache=cache,
        checkpoint=snapshot_bytes,
        workspace=_backward_bytes(trace) + cast_copies + int(heap_overhead * trace.small * activations),
    )


def spread_over(whole: MemoryForecast, num_shards: int, count: ParameterCount, *, outer_bytes: int) -> MemoryForecast:
    """The forecast of one of several processes that share weights, gradients and optimizer (FSDP2).

    Each also holds what is gathered: the outer weights (embeddings, head) for the whole step, two blocks at a time,
    and the whole gradients of one block and of the outer weights until they are shared out.

    Args:
        whole: of a process that holds everything.
        num_shards: processes; 1 changes nothing.
        count: parameters.
        outer_bytes: of the weights outside of the blocks, at most.
    """
    if num_shards == 1:
        return whole
    blocks = max(1, len(count.trained_by_block))
    outer = min(outer_bytes, count.weight_bytes)
    block = (count.weight_bytes - outer) // blocks
    share = count.trained_bytes / max(1, count.weight_bytes)
    return replace(
        whole,
        weights=whole.weights // num_shards + outer + 2 * block,
        gradients=whole.gradients // num_shards + int(share * (outer + block)),
        optimizer=whole.optimizer // num_shards,
    )


def optimizer_state_bytes(name: str, shapes: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Bytes of an optimizer's state.

    Args:
        name: value of `optim`.
        shapes: shape and bytes per element of each trained parameter.
    """
    total = 0
    for shape, element in shapes:
        count = 1
        for size in shape:
            count *= size
        if name == "sgd":
            continue
        if name == "adafactor" and len(shape) >= 2:
            total += 4 * (count // shape[-1] + count // shape[-2])
        elif name == "adafactor":
            total += 4 * count
        elif "8bit" in name:
            total += 2 * count
        else:  # two moments
            total += 2 * element * count
    return total


def _logits_bytes(step: StepShape, head: HeadShape) -> int:
    if not head.is_run:
        return 0
    if head.chunk_rows is None:
        return UNFUSED_LOGITS_COPIES * step.tokens * head.vocab * 4
    chunk = min(step.targets, head.chunk_rows)
    kept_rows = 2 * step.targets * head.width * head.element_bytes  # the chosen rows and their gradient
    kept_weight = head.vocab * head.width * 4 if head.is_trained else 0
    return LOGITS_COPIES * chunk * head.vocab * 4 + kept_rows + kept_weight


def _moments(
    count: ParameterCount, trace: ActivationTrace, every: int, logits: int, *, keeps_gradients: bool
) -> Iterator[tuple[int, int, int]]:
    """Bytes of gradients, activations and logits: after the forward pass, then at each block on the way back."""
    kept = [trace.boundary if is_recomputed(i, every) else size for i, size in enumerate(trace.blocks)]
    alive = trace.outside + sum(kept)
    element = count.trained_bytes / max(1, count.trained)
    by_block = [int(number * element) for number in count.trained_by_block]
    gradients = count.trained_bytes if keeps_gradients else 0
    yield gradients, alive, logits
    for index in reversed(range(len(kept))):
        again = trace.blocks[index] if is_recomputed(index, every) else 0
        yield gradients, alive + again, 0
        alive -= kept[index]
        gradients = min(count.trained_bytes, gradients + by_block[index])
    yield count.trained_bytes, trace.outside, 0


def _backward_bytes(trace: ActivationTrace) -> int:
    """Gradients of intermediate results inside one block: about half of what the block keeps, and two boundaries."""
    return max(trace.blocks, default=0) // 2 + 2 * trace.boundary
