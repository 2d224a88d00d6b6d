"""Facts about model types: data that replaces `if model_type ==` in the rest of the code.

A model type that is not listed gets `UNPROVEN`: right-padded batches and the model's own forward, which is right for
every causal model, only slower. An entry may be added once `tests/model/test_attention.py` passes for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """How logits are made from the last hidden state: `cap(factor * hidden @ head.weight.T)`.

    Attributes:
        multiplied_by: config field that multiplies the logits, or None.
        divided_by: config field that divides them, or None.
        capped_by: config field with the soft-cap c of `c tanh(logits / c)`, or None.
    """

    multiplied_by: str | None = None
    divided_by: str | None = None
    capped_by: str | None = None

    def factor(self, config: Any) -> float:
        """Number that multiplies the logits of a model with this config."""
        times = float(getattr(config, self.multiplied_by)) if self.multiplied_by else 1.0
        return times / float(getattr(config, self.divided_by)) if self.divided_by else times

    def cap(self, config: Any) -> float | None:
        """Soft-cap of the logits, or None."""
        return getattr(config, self.capped_by) if self.capped_by else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the engine may assume about a model type.

    Attributes:
        segments: rows laid end to end are exact through `model.attention` (proven by test).
        prenorm_blocks: the blocks are those that `model.kernels.decoder` computes (proven by test).
        head: how logits are made, or None where it is not known; then the model makes them itself.
    """

    segments: bool
    prenorm_blocks: bool
    head: Head | None


UNPROVEN = Family(segments=False, prenorm_blocks=False, head=None)
_PLAIN = Family(segments=True, prenorm_blocks=True, head=Head())

FAMILIES: dict[str, Family] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "smollm3": _PLAIN,
}


def family_of(model_type: str) -> Family:
    """The facts about `config.model_type`."""
    return FAMILIES.get(model_type, UNPROVEN)
