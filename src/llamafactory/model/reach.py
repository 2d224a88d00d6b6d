"""Which weights an adapter acts on, in words where it leaves the experts of a mixture out. Counts, no values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llamafactory.model.skeleton import decoder_blocks

_ADDED = (".lora_", ".modules_to_save.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Parameters of the decoder blocks' matrices, the adapter's own left out.

    Attributes:
        matrices: all of them.
        adapted: those of matrices that have an adapter.
        experts: those of routed experts.
        adapted_experts: those of routed experts that have an adapter.
    """

    matrices: int
    adapted: int
    experts: int
    adapted_experts: int

    def words(self) -> str | None:
        """What a person should know who trains a mixture of experts, or None where there is nothing to say."""
        if not self.experts or not self.adapted:
            return None
        if self.adapted_experts == self.experts:
            return f"the adapter reaches every expert: {self.adapted:,} of {self.matrices:,} parameters of the blocks"
        left = self.experts - self.adapted_experts
        part = "none" if not self.adapted_experts else f"{self.adapted_experts:,}"
        return (
            f"the adapter reaches {self.adapted:,} of {self.matrices:,} parameters of the blocks, and {part} of those "
            f"of the experts: {left:,} ({left / self.matrices:.0%}) stay as they are; "
            "lora_target: all reaches them too"
        )


def reach_of(model: nn.Module) -> Reach:
    """Counts what the adapters of a model act on; a model without an adapter reaches nothing."""
    matrices = adapted = experts = adapted_experts = 0
    for block in decoder_blocks(model):
        wrapped = _wrapped(block)
        for name, parameter in block.named_parameters():
            if parameter.dim() < 2 or any(part in f".{name}" for part in _ADDED):
                continue
            is_expert = parameter.dim() == 3 or ".experts." in f".{name}"
            is_adapted = id(parameter) in wrapped
            number = parameter.numel()
            matrices += number
            experts += number if is_expert else 0
            adapted += number if is_adapted else 0
            adapted_experts += number if is_expert and is_adapted else 0
    return Reach(matrices=matrices, adapted=adapted, experts=experts, adapted_experts=adapted_experts)


def _wrapped(block: nn.Module) -> set[int]:
    """The weights inside of peft's layers, by identity."""
    found: set[int] = set()
    for module in block.modules():
        inner: Any = module
        if not hasattr(inner, "base_layer"):
            continue
        name = getattr(inner, "parameter_name", "weight")
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        found.add(id(getattr(inner, name, None)))
    return found
