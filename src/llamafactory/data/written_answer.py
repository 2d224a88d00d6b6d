"""Answers as a named template writes them, before they become turns: lists of pieces, and what closes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from llamafactory.data.types import Conversation, Message, Piece, Segment


class Answer(NamedTuple):
    """One answer as written, and the text between the answer before it and this one.

    `is_open`: the slot does not write the stop of the answer.
    """

    message_index: int
    question: list[Piece]
    empty_thought: list[Piece]
    answer: list[Piece]
    is_open: bool

    @property
    def pieces(self) -> list[Piece]:
        """All of it, in order."""
        return self.question + self.empty_thought + self.answer


class AnswerEnd(NamedTuple):
    """What closes an answer; `is_in_history`: a longer dialogue has it there too."""

    pieces: list[Piece]
    is_in_history: bool = True


def with_ends(answers: Sequence[Answer], ends: Sequence[AnswerEnd]) -> list[Answer]:
    """The answers closed; what the question behind an answer begins with is taken from there."""
    if not any(end.pieces for end in ends):
        return list(answers)
    closed: list[Answer] = []
    num_taken = 0
    for answer, end in zip(answers, ends, strict=True):
        closed.append(answer._replace(question=_from(answer.question, num_taken), answer=answer.answer + end.pieces))
        num_taken = len(text_of(end.pieces))
    return closed


def _from(pieces: Sequence[Piece], start: int) -> list[Piece]:
    """The pieces without the first `start` characters."""
    kept: list[Piece] = []
    for piece in pieces:
        if len(piece.text) > start:
            kept.append(piece._replace(text=piece.text[start:]))
        start = max(start - len(piece.text), 0)
    return kept


def until(conversation: Conversation, index: int) -> Conversation:
    """The conversation up to and with the message of that index."""
    return replace(conversation, messages=conversation.messages[: index + 1])


def text_of(pieces: Sequence[Piece]) -> str:
    """The pieces joined."""
    return "".join(piece.text for piece in pieces)


def markup(text: str) -> list[Piece]:
    """A piece of the template, or none where the text is empty."""
    return [Piece(text)] if text else []


def literal(text: str) -> list[Piece]:
    """A piece of a row, or none where the text is empty."""
    return [Piece(text, is_literal=True)] if text else []


def segments_of(pieces: Sequence[Piece], *, trainable: bool = False) -> tuple[Segment, ...]:
    """The pieces as segments that are supervised alike."""
    return tuple([Segment(text, trainable, 1.0, is_literal) for text, is_literal in pieces])


def role_groups(messages: Sequence[Message]) -> list[tuple[int, Sequence[Message]]]:
    """Runs of messages of one role, each with the index of its first message."""
    groups: list[tuple[int, list[Message]]] = []
    for index, message in enumerate(messages):
        if groups and groups[-1][1][0].role == message.role:
            groups[-1][1].append(message)
        else:
            groups.append((index, [message]))
    return list(groups)
