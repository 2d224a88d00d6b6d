"""Memory as it really was: the peak beside its forecast, and an out-of-memory error that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.hardware import forget_process_peak, read_process_memory

if TYPE_CHECKING:
    from llamafactory.model.plan import ModelPlan

_CPU_WORDS = ("can't allocate memory", "not enough memory", "alloc_cpu", "out of memory")
_REMEDIES = {
    "process": "close other programs, or use a machine with more memory",
    "weights": "bf16: true on a GPU (half the bytes), pure_bf16: true, or a smaller model",
    "gradients": "finetuning_type: lora (trains small matrices), or pure_bf16: true",
    "optimizer": "finetuning_type: lora, or optim: adafactor",
    "activations": "disable_gradient_checkpointing: false (recomputes them), or a smaller cutoff_len",
    "logits": "a smaller cutoff_len or per_device_train_batch_size",
    "reference": "finetuning_type: lora (the base with its adapter off is the reference); or ref_model with "
    "ref_model_quantization_bit: 4 in stages dpo and kto",
    "cache": "a smaller rollout_batch_size or max_new_tokens",
    "checkpoint": "async_save: false (training waits while a checkpoint is written)",
    "workspace": "a smaller cutoff_len",
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The highest memory since a moment, whatever this process did before.

    Attributes:
        before: bytes of an earlier peak of the process that the system could not forget, or 0.
    """

    before: int

    @classmethod
    def begin(cls) -> Peak:
        """Begins to measure."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return cls(before=forget_process_peak())

    def bytes_on(self, device: str) -> int:
        """Of this process on a CPU, of the device's allocator elsewhere; 0 where it is not known."""
        if device == "cuda":
            return torch.cuda.max_memory_reserved()
        used = read_process_memory()[1] if device == "cpu" else 0
        return used if used > self.before else 0


def compare(plan: ModelPlan, peak: Peak) -> dict[str, int] | None:
    """Forecast and real peak in bytes, of this process and device; None where either is not known."""
    used = peak.bytes_on(plan.device)
    if plan.costs is None or not used:
        return None
    memory = plan.costs.memory
    planned = memory.total if plan.device == "cpu" else memory.total - memory.process
    return {"planned": planned, "used": used}


def compare_line(figures: dict[str, int] | None) -> str:
    """`planned 2.6 GB, used 2.5 GB`, or nothing."""
    return f", planned {figures['planned'] / 1e9:.2f} GB, used {figures['used'] / 1e9:.2f} GB" if figures else ""


@contextmanager
def explained(plan: ModelPlan) -> Iterator[None]:
    """Turns an out-of-memory error into one that names the largest part and what to change.

    Raises:
        LlamaFactoryError: memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise LlamaFactoryError(explanation(plan, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def explanation(plan: ModelPlan, error: BaseException) -> str:
    """What ran out, where memory goes by the forecast, and what to change, the largest part first."""
    where = "the RAM" if plan.device == "cpu" else f"the memory of the {plan.device} device"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    lines = [f"{where} is not enough for this run: {first_line}"]
    if plan.costs is None:
        lines.append("Change first: a smaller cutoff_len or per_device_train_batch_size, or finetuning_type: lora.")
        return "\n".join(lines)
    parts = sorted(plan.costs.memory.parts().items(), key=lambda part: -part[1])
    sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts[:4])
    lines.append(f"By the forecast the run needs {plan.costs.memory.total / 1e9:.2f} GB: {sizes}.")
    changes = [(name, _REMEDIES[name]) for name, _ in parts if _helps(name, plan)]
    lines += [f"    {name}: {remedy}" for name, remedy in changes[:3]]
    lines.append("llamafactory-cli plan CONFIG key=value shows what a change saves.")
    return "\n".join(lines)


def _helps(part: str, plan: ModelPlan) -> bool:
    """Whether the remedy of a part is still open."""
    if part in ("process", "workspace"):
        return False
    return not (part == "activations" and plan.checkpoint_every == 1)
