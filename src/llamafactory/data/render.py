"""Conversation -> turns whose segments know whether they carry loss. Pure text; no tokenizer.

The template writes the text; here the masking options and the marks of single messages are laid over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llamafactory.data.types import Conversation, MaskOptions, Message, Segment, Template, Turn
from llamafactory.extras.errors import DataError


def render_turns(conversation: Conversation, template: Template, mask: MaskOptions) -> list[tuple[Turn, ...]]:
    """The training sequences of a conversation: usually one, or one an answer where the template rewrites history.

    Sequences without any trainable segment are left out.

    Raises:
        DataError: `train_on_prompt` with a template that rewrites history (prompts would be trained again and again).
    """
    sequences = template.render(conversation)
    if mask.train_on_prompt and len(sequences) > 1:
        raise DataError(
            f"template '{template.name}' rewrites history, so that each answer becomes a sequence of its own",
            where="train_on_prompt",
            expected="a template that writes history as it was",
            fix="set train_on_prompt: false, or use conversations of a single turn",
        )
    last = max((turn.message_index for turns in sequences for turn in turns), default=-1)
    marked = [
        tuple(_mark(turn, conversation, mask, is_last=turn.message_index == last) for turn in turns)
        for turns in sequences
    ]
    return [turns for turns in marked if any(s.trainable for turn in turns for s in (*turn.prompt, *turn.answer))]


def _mark(turn: Turn, conversation: Conversation, mask: MaskOptions, *, is_last: bool) -> Turn:
    message = conversation.messages[turn.message_index]
    prompt = _on(turn.prompt) if mask.train_on_prompt else turn.prompt
    return replace(
        turn, prompt=prompt, answer=_answer(turn.answer, message, is_masked=mask.mask_history and not is_last)
    )


def _answer(answer: Sequence[Segment], message: Message, *, is_masked: bool) -> tuple[Segment, ...]:
    """The answer with its message's own `train` and `weight`; `train` beats the masking options."""
    is_trained = not is_masked if message.train is None else message.train
    if is_trained and message.weight == 1.0:
        return tuple(answer)
    if not is_trained or message.weight == 0.0:
        return tuple(replace(segment, trainable=False) for segment in answer)
    return tuple(replace(segment, weight=message.weight) if segment.trainable else segment for segment in answer)


def _on(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple(replace(segment, trainable=True) for segment in segments)
