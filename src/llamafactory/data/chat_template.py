"""Named chat templates: declarative records, and how a conversation is written with one.

A slot is a text with the placeholders `{{content}}`, `{{bos}}` and `{{eos}}`. Only the slot is searched for
placeholders, never the text of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, cast

from llamafactory.data.templates.index import entry_names, read_entry
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
        system_in_user: the system slot is written inside the first user message, before its text.
        observation: slot of a tool's result; None: as `user`.
        function: slot of an answer that calls tools; None: as `assistant`.
        tools: slot of the tools' JSON; None: the tool format describes the tools.
        prefix: slot written once, before everything.
        default_system: system text of a conversation that has none.
        stop_words: texts that end an answer, besides the tokenizer's end token.
        replace_eos: `{{eos}}`, and the token that ends generation, is the first stop word.
        efficient_eos: the answer slot has no end token; one is added behind the last answer for training.
        thought_words: what opens and what closes a thought in an answer.
        empty_thought: what stands before an answer without a thought; empty: the models do not think.
        past_thought: what stands before an answer whose thought is left out because its turn is past.
        tool_format: name of the file in `tool_formats` that writes and reads tool calls.
    """

    name: str
    user: str = "{{content}}"
    assistant: str = "{{content}}{{eos}}"
    system: str = "{{content}}"
    system_in_user: bool = False
    observation: str | None = None
    function: str | None = None
    tools: str | None = None
    prefix: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    empty_thought: str = ""
    past_thought: str = ""
    tool_format: str = "default"

    @property
    def is_reasoning(self) -> bool:
        """Whether answers may start with a thought."""
        return bool(self.empty_thought)


def template_names() -> tuple[str, ...]:
    """Names of all templates that have an entry, sorted."""
    return entry_names()


@cache
def find_record(name: str) -> ChatTemplate:
    """The template of that name, with what it inherits through `extends` filled in.

    Raises:
        DataError: no template has that name.
    """
    if name not in (names := template_names()):
        hint = did_you_mean(name, [*names, "auto"])
        raise DataError(
            f"unknown template '{name}'",
            where="template",
            expected=f"auto, or one of {len(names)} names{'' if hint else ': ' + ', '.join(names)}",
            fix=f"{hint + ' ' if hint else ''}'auto' uses the chat template that the tokenizer brings",
        )
    entry = {key: value for key, value in read_entry(name).items() if key != "extends"}
    if unknown := entry.keys() - {field.name for field in fields(ChatTemplate)}:
        raise ValueError(f"template entry '{name}' has unknown fields: {sorted(unknown)}")
    values: dict[str, Any] = {key: _frozen(value) for key, value in entry.items()}
    values["name"] = name
    return ChatTemplate(**values)


def _frozen(value: object) -> object:
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTemplate:
    """A record bound to a tokenizer's begin and end tokens; the `Template` that training and chat use.

    A template of models that think (`empty_thought`) writes answers by these rules. An answer without a thought gets
    an empty one, supervised if `enable_thinking` is True, else as part of the prompt. False takes the thoughts out of
    all answers. Before a new answer, thoughts of past turns (up to the last user message) are left out.

    Attributes:
        record: the markup.
        bos: the tokenizer's begin token.
        eos: the tokenizer's end token.
        default_system: replaces the record's own; None: does not.
        tool_format_name: replaces the record's own; None: does not.
        enable_thinking: True: answers think; False: they do not; None: each as its row does.
        preserve_thinking: thoughts of past turns stay before a new answer.
        strips_history: training leaves thoughts of past turns out, too: right where only last answers are trained.
        adds_end: False leaves out the end token that `efficient_eos` adds: the bare text of the template.
    """

    record: ChatTemplate
    bos: str = ""
    eos: str = ""
    default_system: str | None = None
    tool_format_name: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    strips_history: bool = False
    adds_end: bool = True

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
        return find_tool_format(self.tool_format_name or self.record.tool_format)

    def render(self, conversation: Conversation) -> Sequence[tuple[Turn, ...]]:
        """One sequence of turns; messages after the last answer are left out."""
        turns: list[Turn] = []
        answers, _ = self._write(conversation, leaves_past_thoughts=self.strips_history and not self.preserve_thinking)
        for written in answers:
            asked, answer = written.question, written.answer
            if self.enable_thinking:
                answer = written.empty_thought + answer
            else:
                asked = asked + written.empty_thought
            if self.record.efficient_eos and self.adds_end and written is answers[-1]:
                answer = answer + self._fill("{{eos}}", [])
            prompt, target = _segments(asked), _segments(answer, trainable=True)
            turns.append(Turn(prompt=prompt, answer=target, message_index=written.index))
        return [tuple(turns)]

    def render_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The text before the next answer."""
        answers, question = self._write(conversation, leaves_past_thoughts=not self.preserve_thinking)
        pieces = [piece for written in answers for piece in written.pieces] + question
        return _segments(pieces + (_markup(self.record.empty_thought) if self.enable_thinking is False else []))

    def _write(self, conversation: Conversation, *, leaves_past_thoughts: bool) -> tuple[list[_Answer], list[Piece]]:
        """All answers, each with what is before it, and what is behind the last one."""
        messages = conversation.messages
        last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
        num_past = last_user if leaves_past_thoughts else 0
        answers: list[_Answer] = []
        question, system = self._opening(conversation)
        for start, group in _groups(messages):
            if group[0].role == "assistant":
                for index, message in enumerate(group, start):
                    answers.append(self._answer(message, index, question, is_past=index < num_past))
                    question = []
            else:
                question = question + self._question(group, system)
                system = system if group[0].role != "user" else []
        return answers, question

    def _opening(self, conversation: Conversation) -> tuple[list[Piece], list[Piece]]:
        """What is before the first message, and what the first user message starts with."""
        messages, tools = conversation.messages, conversation.tools
        own_default = self.record.default_system if self.default_system is None else self.default_system
        text = messages[0].content if messages and messages[0].role == "system" else own_default
        content = _literal(text) + (self._describe(tools) if tools else [])
        prefix = self._fill(self.record.prefix, [])
        system = self._fill(self.record.system, content) if content or tools is not None else []
        if self.record.system_in_user and any(message.role == "user" for message in messages):
            return prefix, system
        return prefix + system, []

    def _describe(self, tools: Sequence[Mapping[str, object]]) -> list[Piece]:
        if self.record.tools is None or self.tool_format_name:
            return self.tool_format.describe_tools(tools)
        return self._fill(self.record.tools, _literal(json.dumps(list(tools), ensure_ascii=False)))

    def _question(self, group: Sequence[Message], system: Sequence[Piece]) -> list[Piece]:
        if group[0].role == "system":
            return []
        if group[0].role == "user":
            contents = [[*(system if place == 0 else ()), *_literal(m.content)] for place, m in enumerate(group)]
            return [piece for content in contents for piece in self._fill(self.record.user, content)]
        slot = self.record.user if self.record.observation is None else self.record.observation
        return self._fill(slot, self.tool_format.join_results([message.content for message in group]))

    def _answer(self, message: Message, index: int, question: list[Piece], *, is_past: bool) -> _Answer:
        record, text, empty = self.record, message.content, ""
        if record.is_reasoning:
            opening, closing = (word.strip() for word in record.thought_words)
            if is_past or self.enable_thinking is False:
                text = _thought_pattern(opening, closing).sub("", text).lstrip("\n")
            if is_past:
                empty = record.past_thought
            elif opening not in text and closing not in text:
                empty = record.empty_thought
        content = self._spoken(text)
        if message.tool_calls:
            content += self.tool_format.render_calls(message.tool_calls)
        slot = record.assistant if record.function is None or not message.tool_calls else record.function
        pieces = self._fill(slot, content)
        return _Answer(index=index, question=question, empty_thought=_markup(empty), answer=pieces)

    def _spoken(self, text: str) -> list[Piece]:
        """The text of an answer, in which the words around a thought are markup."""
        if not self.record.is_reasoning:
            return _literal(text)
        words = [word.strip() for word in self.record.thought_words]
        match = _thought_pattern(*words).search(text)
        if match is None:
            return _literal(text)
        sides = [_literal(side) for side in (text[: match.start()], match[1], text[match.end() :])]
        return [*sides[0], Piece(words[0]), *sides[1], Piece(words[1]), *sides[2]]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """One answer as written, and the text between the answer before it and this one."""

    index: int
    question: list[Piece]
    empty_thought: list[Piece]
    answer: list[Piece]

    @property
    def pieces(self) -> list[Piece]:
        return self.question + self.empty_thought + self.answer


@cache
def _thought_pattern(opening: str, closing: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(opening)}(.*?){re.escape(closing)}", re.DOTALL)


def _markup(text: str) -> list[Piece]:
    return [Piece(text)] if text else []


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
