"""Conversation -> turns whose segments know whether they carry loss. Pure text; no tokenizer.

The template writes the text; here the masking options and the marks of single messages are laid over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from llamafactory.data.types import Conversation, MaskOptions, Message, Segment, Template, Turn
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note
from llamafactory.hparams.data import DataConfig

REWRITTEN, LEFT_OUT = "conversations with rewritten history", "answers left out"
"""What `render_turns` counts."""


def mask_options(data: DataConfig) -> MaskOptions:
    """The masking options of a configuration."""
    return MaskOptions(
        train_on=data.answers_trained, train_on_prompt=data.train_on_prompt, rewritten_history=data.rewritten_history
    )


def render_turns(
    conversation: Conversation, template: Template, mask: MaskOptions, *, counts: Counter[str] | None = None
) -> list[tuple[Turn, ...]]:
    """The training sequences of a conversation: usually one, or one an answer where the template rewrites history.

    Sequences without any trainable segment are left out.

    Args:
        conversation: what is rendered.
        template: writes the text.
        mask: what carries loss.
        counts: where it is counted that a conversation has more than one sequence (`REWRITTEN`), and answers that
            `rewritten_history: last` leaves out (`LEFT_OUT`).

    Raises:
        DataError: `train_on_prompt` with a template that rewrites history (prompts would be trained again and again).
    """
    sequences = template.render(conversation)
    if mask.train_on_prompt and len(sequences) > 1:
        raise DataError(
            f"template '{template.name}' rewrites history, so that each answer becomes a sequence of its own",
            where="train_on_prompt",
            expected="a template that writes history as it was",
            fix="set train_on_prompt: false, or use conversations of a single turn; thoughts: preserve_thinking: true",
        )
    last = max((turn.message_index for turns in sequences for turn in turns), default=-1)
    marked = [
        tuple(_mark(turn, conversation, mask, is_last=turn.message_index == last) for turn in turns)
        for turns in sequences
    ]
    kept = [turns for turns in marked if any(s.trainable for turn in turns for s in (*turn.prompt, *turn.answer))]
    used = kept[-1:] if mask.rewritten_history == "last" else kept
    if len(kept) > 1:
        what = "only the last of them is trained" if len(used) == 1 else "each becomes a training sequence of its own"
        note(f"template {template.name} shows earlier answers otherwise than they were generated; {what}", once=True)
    if counts is not None and len(kept) > 1:
        counts.update({REWRITTEN: 1, LEFT_OUT: len(kept) - len(used)})
    return used


def _mark(turn: Turn, conversation: Conversation, mask: MaskOptions, *, is_last: bool) -> Turn:
    message = conversation.messages[turn.message_index]
    prompt = _on(turn.prompt) if mask.train_on_prompt else turn.prompt
    is_wanted = {"all": True, "last": is_last, "tool_calls": bool(message.tool_calls)}[mask.train_on]
    answer = _answer(turn.answer, message, is_masked=not is_wanted)
    return turn if prompt is turn.prompt and answer is turn.answer else replace(turn, prompt=prompt, answer=answer)


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
