"""Where a step's time goes: torch's profiler over a few steps, its traces, and a summary in plain words.

Written under `<output_dir>/profiler/rank_N`: `trace_*.json` (for chrome://tracing or Perfetto) and `why_slow.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras import log

if TYPE_CHECKING:
    from llamafactory.hparams.train import TrainConfig

SUMMARY = "why_slow.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A kind of work.

    Attributes:
        name: for people.
        words: an operator belongs here if its name holds one of them; the first part that fits counts.
        advice: what to do where this part is large.
    """

    name: str
    words: tuple[str, ...]
    advice: str


PARTS = (
    Part(name="attention", words=("scaled_dot_product", "flash", "varlen", "fmha"),
         advice="grows with the square of a row's length: a smaller cutoff_len cuts it"),
    Part(name="matrix products", words=("mm", "linear", "matmul", "gemm", "conv"),
         advice="this is the model itself; where it is most of the time, only a smaller model, fewer tokens or a "
                "faster device help"),
    Part(name="optimizer", words=("adam", "sgd", "adafactor", "foreach", "clip", "optimizer"),
         advice="once a step: more rows a step (per_device_train_batch_size or gradient_accumulation_steps)"),
    Part(name="between processes", words=("nccl", "gloo", "all_reduce", "allreduce", "all_gather", "broadcast"),
         advice="once a step: more rows a step, or fewer processes"),
    Part(name="copies", words=("copy", "cat", "index", "gather", "scatter", "contiguous", "to_copy", "memcpy", "fill",
                               "zero"),
         advice="padding, casts and slices: check the plan's layout and dtype"),
    Part(name="waiting for the device", words=("synchronize", "item", "_local_scalar", "nonzero"),
         advice="the host waits: a larger logging_steps, or a report"),
)  # fmt: skip
OTHER = Part(
    name="element-wise and other", words=(), advice="norms, activations, rotary, softmax: fused_kernels: true"
)


@contextmanager
def profiling(cfg: TrainConfig, output_dir: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Profiles the steps that the `profiler_*` keys choose.

    Args:
        cfg: the keys.
        output_dir: of the run.
        rank: of this process.

    Yields:
        A function to call after each step; it does nothing where the profiler is off.
    """
    if not cfg.enable_torch_profiler:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    folder = Path(cfg.profiler_output_dir or output_dir / "profiler") / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    with profile(
        schedule=schedule(
            wait=cfg.profiler_wait_steps,
            warmup=cfg.profiler_warmup_steps,
            active=cfg.profiler_active_steps,
            repeat=cfg.profiler_repeat,
        ),
        on_trace_ready=lambda trace: _write(trace, folder),
        record_shapes=cfg.profiler_record_shapes,
        profile_memory=cfg.profiler_profile_memory,
        with_stack=cfg.profiler_with_stack,
    ) as profiler:
        yield profiler.step
    if not (folder / SUMMARY).is_file():
        needed = cfg.profiler_wait_steps + cfg.profiler_warmup_steps + cfg.profiler_active_steps
        log.warn(f"enable_torch_profiler: the run ended before step {needed}, so there is no profile")


def _write(trace: Any, folder: Path) -> None:
    trace.export_chrome_trace(str(folder / f"trace_{trace.step_num}.json"))
    events = list(trace.key_averages())
    on_device = sum(float(event.self_device_time_total) for event in events) > 0
    kind = "self_device_time_total" if on_device else "self_cpu_time_total"
    times = {event.key: float(getattr(event, kind)) / 1e6 for event in events if not event.key.startswith("Profiler")}
    lines = summary_lines(times, "device" if on_device else "CPU")
    (folder / SUMMARY).write_text("\n".join([*lines, ""]), encoding="utf-8")
    for line in lines:
        log.info(line)


def summary_lines(times: Mapping[str, float], what: str) -> list[str]:
    """Where the time went, largest part first, each with its largest operators and what to do.

    Args:
        times: seconds that each operator took itself.
        what: whose time it is, for people.
    """
    total = sum(times.values()) or 1.0
    groups: dict[str, dict[str, float]] = {part.name: {} for part in (*PARTS, OTHER)}
    for name, seconds in times.items():
        groups[part_of(name).name][name] = seconds
    advice = {part.name: part.advice for part in (*PARTS, OTHER)}
    lines = [f"where the time went ({total:.2f} s of {what} time):"]
    for name, members in sorted(groups.items(), key=lambda item: -sum(item[1].values())):
        share = sum(members.values()) / total
        if share >= 0.01:
            lines.append(f"  {share:4.0%} {name} ({', '.join(_largest(members))}): {advice[name]}")
    return lines


def part_of(operator: str) -> Part:
    """The kind of work that an operator does."""
    name = operator.lower()
    return next((part for part in PARTS if any(word in name for word in part.words)), OTHER)


def _largest(members: Mapping[str, float], count: int = 3) -> Iterable[str]:
    return [name.removeprefix("aten::") for name in sorted(members, key=lambda name: -members[name])[:count]]
