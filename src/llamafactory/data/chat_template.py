"""Named chat templates: declarative records, and how a conversation is written with one.

A slot is a text with the placeholders `{{content}}`, `{{bos}}` and `{{eos}}`. Only the slot is searched for
placeholders, never the text of a row.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, cast

from llamafactory.data.tool_formats import ToolFormat, find_tool_format
from llamafactory.data.types import Conversation, Message, Piece, Segment, Turn
from llamafactory.extras.errors import DataError
from llamafactory.extras.suggest import did_you_mean

_PLACEHOLDER = re.compile(r"\{\{(content|bos|eos)\}\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """How one family of models writes a conversation. Slots hold the markup; defaults are those of a bare text.

    Attributes:
        name: the name users write in `template:`.
        user: slot of a user message; ends with what asks the model to answer.
        assistant: slot of an answer; ends with its stop.
        system: slot of the system text, followed inside by the description of tools.
        observation: slot of a tool's result; None: as `user`.
        function: slot of an answer that calls tools; None: as `assistant`.
        prefix: slot written once, before everything.
        default_system: system text of a conversation that has none.
        stop_words: texts that end an answer, besides the tokenizer's end token.
        replace_eos: `{{eos}}`, and the token that ends generation, is the first stop word.
        efficient_eos: the answer slot has no end token; one is added after each answer for training.
        thought_words: what opens and what closes a thought in an answer.
        tool_format: name of the file in `tool_formats` that writes and reads tool calls.
    """

    name: str
    user: str = "{{content}}"
    assistant: str = "{{content}}{{eos}}"
    system: str = "{{content}}"
    observation: str | None = None
    function: str | None = None
    prefix: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    tool_format: str = "default"


def template_names() -> tuple[str, ...]:
    """Names of all templates that have an entry, sorted."""
    return tuple(sorted(_entries()))


def find_record(name: str) -> ChatTemplate:
    """The template of that name, with what it inherits through `extends` filled in.

    Raises:
        DataError: no template has that name.
    """
    entries = _entries()
    if name not in entries:
        hint = did_you_mean(name, [*entries, "auto"])
        raise DataError(
            f"unknown template '{name}'",
            where="template",
            expected=f"auto, {', '.join(template_names())}",
            fix=f"{hint + ' ' if hint else ''}'auto' uses the chat template that the tokenizer brings",
        )
    return _record(name, entries)


def _record(name: str, entries: Mapping[str, Mapping[str, object]]) -> ChatTemplate:
    merged: dict[str, object] = {}
    chain = [name]
    while parent := entries[chain[-1]].get("extends"):
        chain.append(str(parent))
    for entry in reversed(chain):
        merged.update(entries[entry])
    merged.pop("extends", None)
    known = {field.name for field in fields(ChatTemplate)}
    if unknown := merged.keys() - known:
        raise ValueError(f"template entry '{name}' has unknown fields: {sorted(unknown)}")
    values: dict[str, Any] = {key: _frozen(value) for key, value in merged.items()}
    values["name"] = name
    return ChatTemplate(**values)


def _frozen(value: object) -> object:
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


@cache
def _entries() -> Mapping[str, Mapping[str, object]]:
    """All entries of all files, by name."""
    found: dict[str, Mapping[str, object]] = {}
    for file in sorted(resources.files("llamafactory.data.templates").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            for name, entry in tomllib.loads(file.read_text(encoding="utf-8")).items():
                if name in found:
                    raise ValueError(f"two template entries are named '{name}'")
                found[name] = entry
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTemplate:
    """A record bound to a tokenizer's begin and end tokens; the `Template` that training and chat use."""

    record: ChatTemplate
    bos: str = ""
    eos: str = ""
    default_system: str | None = None

    @property
    def name(self) -> str:
        """The record's name."""
        return self.record.name

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The record's stop words."""
        return self.record.stop_words

    @property
    def is_tokenized_whole(self) -> bool:
        """False: prompts and answers are tokenised each on their own, as users of named templates know it."""
        return False

    @property
    def tool_format(self) -> ToolFormat:
        """Writes and reads the tool calls of this template."""
        return find_tool_format(self.record.tool_format)

    def render(self, conversation: Conversation) -> Sequence[tuple[Turn, ...]]:
        """One sequence of turns; messages after the last answer are left out."""
        turns: list[Turn] = []
        prompt = self._opening(conversation)
        for start, group in _groups(conversation.messages):
            if group[0].role == "assistant":
                for offset, message in enumerate(group):
                    answer = _segments(self._answer(message), trainable=True)
                    turns.append(Turn(prompt=_segments(prompt), answer=answer, message_index=start + offset))
                    prompt = []
            else:
                prompt += self._question(group)
        return [tuple(turns)]

    def render_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The text before the next answer."""
        pieces = self._opening(conversation)
        for _, group in _groups(conversation.messages):
            if group[0].role == "assistant":
                pieces += [piece for message in group for piece in self._answer(message)]
            else:
                pieces += self._question(group)
        return _segments(pieces)

    def _opening(self, conversation: Conversation) -> list[Piece]:
        first = conversation.messages[0] if conversation.messages else None
        own_default = self.record.default_system if self.default_system is None else self.default_system
        system = first.content if first is not None and first.role == "system" else own_default
        content = [Piece(system, is_literal=True)] if system else []
        if conversation.tools:
            content += self.tool_format.describe_tools(conversation.tools)
        pieces = self._fill(self.record.prefix, [])
        has_system = bool(content) or conversation.tools is not None
        return pieces + self._fill(self.record.system, content) if has_system else pieces

    def _question(self, group: Sequence[Message]) -> list[Piece]:
        if group[0].role == "system":
            return []
        if group[0].role == "user":
            return [piece for message in group for piece in self._fill(self.record.user, _literal(message.content))]
        slot = self.record.user if self.record.observation is None else self.record.observation
        return self._fill(slot, self.tool_format.join_results([message.content for message in group]))

    def _answer(self, message: Message) -> list[Piece]:
        record = self.record
        slot = record.assistant if record.function is None or not message.tool_calls else record.function
        content = _literal(message.content)
        if message.tool_calls:
            content += self.tool_format.render_calls(message.tool_calls)
        return self._fill(slot + "{{eos}}" if record.efficient_eos else slot, content)

    def _fill(self, slot: str, content: Sequence[Piece]) -> list[Piece]:
        """The slot with its placeholders filled; markup and row text stay apart."""
        eos = self.record.stop_words[0] if self.record.replace_eos and self.record.stop_words else self.eos
        pieces: list[Piece] = []
        for place, text in enumerate(_PLACEHOLDER.split(slot)):
            if place % 2 == 0:
                pieces.append(Piece(text))
            elif text == "content":
                pieces.extend(content)
            else:
                pieces.append(Piece(self.bos if text == "bos" else eos))
        return [piece for piece in pieces if piece.text]


def _literal(text: str) -> list[Piece]:
    return [Piece(text, is_literal=True)] if text else []


def _segments(pieces: Sequence[Piece], *, trainable: bool = False) -> tuple[Segment, ...]:
    return tuple(Segment(text=piece.text, trainable=trainable, is_literal=piece.is_literal) for piece in pieces)


def _groups(messages: Sequence[Message]) -> list[tuple[int, Sequence[Message]]]:
    """Runs of messages of one role, each with the index of its first message."""
    groups: list[tuple[int, list[Message]]] = []
    for index, message in enumerate(messages):
        if groups and groups[-1][1][0].role == message.role:
            groups[-1][1].append(message)
        else:
            groups.append((index, [message]))
    return list(groups)
