"""Conversation -> turns whose segments know whether they carry loss. Pure text; no tokenizer.

The template writes the text; here the masking options and the marks of single messages are laid over it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llamafactory.data.types import Conversation, MaskOptions, Segment, Template, Turn
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
    conversation: Conversation, template: Template, mask: MaskOptions, *, counts: dict[str, int] | None = None
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
    last = max([turn.message_index for turns in sequences for turn in turns], default=-1)
    marked = [
        tuple([_mark(turn, conversation, mask, is_last=turn.message_index == last) for turn in turns])
        for turns in sequences
    ]
    kept = [turns for turns in marked if _is_trainable(turns)]
    used = kept[-1:] if mask.rewritten_history == "last" else kept
    if len(kept) > 1:
        what = "only the last of them is trained" if len(used) == 1 else "each becomes a training sequence of its own"
        note(f"template {template.name} shows earlier answers otherwise than they were generated; {what}", once=True)
    if counts is not None and len(kept) > 1:
        counts.update({REWRITTEN: 1, LEFT_OUT: len(kept) - len(used)})
    return used


def _is_trainable(turns: Sequence[Turn]) -> bool:
    for turn in turns:
        for segment in (*turn.answer, *turn.prompt):
            if segment.trainable:
                return True
    return False


def _mark(turn: Turn, conversation: Conversation, mask: MaskOptions, *, is_last: bool) -> Turn:
    message = conversation.messages[turn.message_index]
    if message.train is None:
        is_trained = mask.train_on == "all" or (is_last if mask.train_on == "last" else bool(message.tool_calls))
    else:
        is_trained = message.train  # beats the masking options
    if is_trained and message.weight == 1.0 and not mask.train_on_prompt:
        return turn
    return turn._replace(
        prompt=_on(turn.prompt) if mask.train_on_prompt else turn.prompt,
        answer=_weighted(turn.answer, message.weight if is_trained else 0.0),
    )


def _weighted(answer: Sequence[Segment], weight: float) -> tuple[Segment, ...]:
    if weight == 0.0:
        return tuple([segment._replace(trainable=False) for segment in answer])
    return tuple([segment._replace(weight=weight) if segment.trainable else segment for segment in answer])


def _on(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple([segment._replace(trainable=True) for segment in segments])
