"""Facts about model types: data that replaces `if model_type ==` in the rest of the code.

A model type that is not listed gets `UNPROVEN`: right-padded batches and the model's own forward, which is right for
every causal model, only slower. An entry may be added once `tests/model/test_attention.py` passes for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the engine may assume about a model type.

    Attributes:
        segments: rows laid end to end are exact through `model.attention` (proven by test).
        plain_head: logits are `hidden @ head.weight.T` and nothing else (no soft-cap, scale or bias).
    """

    segments: bool
    plain_head: bool


UNPROVEN = Family(segments=False, plain_head=False)
_PLAIN = Family(segments=True, plain_head=True)

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
