"""How a run is made to fit: sizes of forward passes and recomputation, tried from the fastest to the smallest.

What this file never does: count a byte; the forecast of each way to run comes in as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.model.memory import DEVICE_SHARE, MemoryForecast
from llamafactory.model.workload import tokens_of

if TYPE_CHECKING:
    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.workload import Workload

CPU_MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass on a CPU: larger ones fall out of the cache, smaller ones starve the matrix products."""
GPU_MICRO_BATCH_TOKENS = 4096
"""Tokens below which a GPU is not filled: recomputing is cheaper than smaller passes."""
RAM_SHARE = 0.9
"""Share of the free RAM that a run may take; the rest stays for the system's own needs."""
BLOCK_STEPS = (8, 6, 4, 3, 2, 1)
"""Every how many blocks one may be recomputed, from the least work to the least memory."""


def room_of(hardware: Hardware, process_bytes: int) -> int:
    """Bytes that a run may take: of a GPU's memory, or of the RAM that is free besides what it has already."""
    if hardware.device == "cpu":
        return int(hardware.memory_bytes * RAM_SHARE) + min(process_bytes, hardware.memory_bytes // 10)
    return int(hardware.memory_bytes * DEVICE_SHARE)


def fit(
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
    is_set = cfg.train.micro_batch_tokens is not None
    for limit, every in _same_size(fastest, forced) if is_set else _ways(fastest, workload, hardware, forced):
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


def require_room_for_longest(cfg: RunConfig, workload: Workload) -> None:
    """A row or bin is never cut or spread over two passes, so the longest of any epoch bounds `micro_batch_tokens`.

    Raises:
        ConfigError: `micro_batch_tokens` is smaller.
    """
    limit = cfg.train.micro_batch_tokens
    longest = 0 if limit is None else sum(map(tokens_of, workload.largest(1).lengths))
    if limit is not None and limit < longest:
        what = "packed bin" if cfg.data.packing or cfg.data.neat_packing else "row"
        raise ConfigError(
            Problem(
                key="micro_batch_tokens", given=str(limit), message=f"the longest {what} has {longest:,} tokens",
                allowed=f"{longest} or more ({workload.source})",
                fix="leave the key out, or make rows shorter with cutoff_len",
            )
        )  # fmt: skip


def _same_size(limit: int | None, forced: bool | None) -> list[tuple[int | None, int]]:
    """Passes of the size that the user set; only recomputation is left to decide."""
    if forced is not None:
        return [(limit, int(not forced))]
    return [(limit, every) for every in (0, *BLOCK_STEPS)]


def _ways(
    fastest: int | None, workload: Workload, hardware: Hardware, forced: bool | None
) -> Iterator[tuple[int | None, int]]:
    """Token limits and recomputation, from the fastest to the one that needs least memory."""
    start = fastest or sum(map(tokens_of, workload.largest(None).lengths))
    longest = max(map(tokens_of, workload.largest(1).lengths))
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
    if cfg.train.micro_batch_tokens is not None:
        return cfg.train.micro_batch_tokens
    if layout == "padded" or hardware.device != "cpu":
        return None
    return max(CPU_MICRO_BATCH_TOKENS, max(map(tokens_of, workload.largest(1).lengths)))


def _micro_batch_reason(
    cfg: RunConfig, layout: str, hardware: Hardware, limit: int | None, fastest: int | None
) -> str:
    rows = cfg.train.per_device_train_batch_size
    if cfg.train.micro_batch_tokens is not None:
        return "micro_batch_tokens (set by you); the optimizer step keeps its rows"
    if limit is None:
        return f"{rows} padded rows a pass" if layout == "padded" else f"{rows} rows laid end to end a pass"
    if limit != fastest:
        return "smaller passes, so that it fits; the optimizer step keeps its rows"
    if hardware.device == "cpu":
        return "a pass that stays near the caches; the optimizer step keeps its rows"
    return "the optimizer step keeps its rows"


def fit_blindly(cfg: RunConfig, hardware: Hardware, layout: str, why: str) -> tuple[int | None, int, dict[str, str]]:
    """Safe choices where the model cannot be looked at."""
    forced = cfg.model.disable_gradient_checkpointing
    every = 1 if forced is None else int(not forced)
    limit = cfg.train.micro_batch_tokens
    if limit is None and layout == "flat" and hardware.device == "cpu":
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
