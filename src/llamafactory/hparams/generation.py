"""Options of text generation, for chat, predictions and rollouts."""

from __future__ import annotations

from llamafactory.hparams.section import Section, option

_GROUP = "Generation"


class GenerationConfig(Section):
    """How the next token is chosen and when an answer ends."""

    do_sample: bool = option(True, "Sample; false takes the most likely token.", group=_GROUP)
    temperature: float = option(0.95, "Sampling temperature.", group=_GROUP, gt=0)
    top_p: float = option(
        0.7, "Sample from the smallest set of tokens with this probability.", group=_GROUP, gt=0, le=1
    )
    top_k: int = option(50, "Sample from this many most likely tokens; 0 for all.", group=_GROUP, ge=0)
    num_beams: int = option(1, "Beams of beam search; 1 for none.", group=_GROUP, ge=1)
    max_length: int = option(1024, "Tokens of prompt and answer; used where max_new_tokens is 0.", group=_GROUP, ge=1)
    max_new_tokens: int = option(1024, "Tokens of an answer, at most.", group=_GROUP, ge=0)
    repetition_penalty: float = option(1.0, "Above 1 makes repeated tokens less likely.", group=_GROUP, gt=0)
    length_penalty: float = option(1.0, "Beam search: above 0 prefers longer answers.", group=_GROUP)
    skip_special_tokens: bool = option(True, "Leave special tokens out of the answer.", group=_GROUP)
