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
_LLAMA_LIKE = Family(segments=True, prenorm_blocks=True, head=Head())
_OTHER_BLOCKS = Family(segments=True, prenorm_blocks=False, head=Head())


def _with_head(head: Head) -> Family:
    return Family(segments=True, prenorm_blocks=False, head=head)


_CAPPED = _with_head(Head(capped_by="final_logit_softcapping"))
_MULTIPLIED = _with_head(Head(multiplied_by="logit_scale"))
_DIVIDED = _with_head(Head(divided_by="logits_scaling"))

FAMILIES: dict[str, Family] = {
    "arcee": _OTHER_BLOCKS,
    "cohere": _MULTIPLIED,
    "cohere2": _MULTIPLIED,
    "ernie4_5": _OTHER_BLOCKS,
    "exaone4": _OTHER_BLOCKS,
    "gemma": _OTHER_BLOCKS,
    "gemma2": _CAPPED,
    "gemma3_text": _CAPPED,
    "glm": _OTHER_BLOCKS,
    "glm4": _OTHER_BLOCKS,
    "gpt_oss": _OTHER_BLOCKS,
    "granite": _DIVIDED,
    "granitemoe": _DIVIDED,
    "helium": _OTHER_BLOCKS,
    "hunyuan_v1_dense": _OTHER_BLOCKS,
    "llama": _LLAMA_LIKE,
    "ministral": _OTHER_BLOCKS,
    "mistral": _LLAMA_LIKE,
    "mixtral": _OTHER_BLOCKS,
    "olmo": _OTHER_BLOCKS,
    "olmo2": _OTHER_BLOCKS,
    "olmo3": _OTHER_BLOCKS,
    "phi": _OTHER_BLOCKS,
    "phi3": _OTHER_BLOCKS,
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": _OTHER_BLOCKS,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": _OTHER_BLOCKS,
    "seed_oss": _OTHER_BLOCKS,
    "smollm3": _LLAMA_LIKE,
    "starcoder2": _OTHER_BLOCKS,
}


def family_of(model_type: str) -> Family:
    """The facts about `config.model_type`."""
    return FAMILIES.get(model_type, UNPROVEN)
