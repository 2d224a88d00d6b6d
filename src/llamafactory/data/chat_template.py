"""Named chat templates: declarative records, and how a conversation is written with one.

A slot is a text with the placeholders `{{content}}`, `{{bos}}` and `{{eos}}`. Only the slot is searched for
placeholders, never the text of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, cast

from llamafactory.data.day import today
from llamafactory.data.templates.index import LEFT_OUT, entry_names, read_entry
from llamafactory.data.tool_formats import ToolFormat, find_tool_format
from llamafactory.data.types import Conversation, Message, Piece, Segment, Turn
from llamafactory.data.written_answer import (
    Answer,
    AnswerEnd,
    literal,
    markup,
    role_groups,
    segments_of,
    text_of,
    until,
    with_ends,
)
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
        efficient_eos: the answer slot has no end token; one is added behind answers for training.
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
    if name in LEFT_OUT:
        raise DataError(
            f"template '{name}' of LLaMA Factory is left out: no text of it was there to prove an entry against",
            where="template",
            expected="auto, or another name",
            fix="template: auto writes what the chat template of the model's tokenizer writes",
        )
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

    Training sees what generation sees: where a whole dialogue shows an earlier answer otherwise than it was generated
    (its thought is left out, or it ends with a token that history does not have), each answer is a sequence of its
    own.

    Attributes:
        record: the markup.
        bos: the tokenizer's begin token.
        eos: the tokenizer's end token.
        default_system: replaces the record's own; None: does not.
        tool_format_name: replaces the record's own; None: does not.
        enable_thinking: True: answers think; False: they do not; None: each as its row does.
        preserve_thinking: thoughts of past turns stay before a new answer.
        is_bare: one rendering of the whole dialogue as the slots write it: no added end, all thoughts.
    """

    record: ChatTemplate
    bos: str = ""
    eos: str = ""
    default_system: str | None = None
    tool_format_name: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    is_bare: bool = False

    @property
    def name(self) -> str:
        """The record's name."""
        return self.record.name

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The record's stop words."""
        return self.record.stop_words

    @property
    def end_token(self) -> str:
        """What `{{eos}}` stands for."""
        return self.record.stop_words[0] if self.record.replace_eos and self.record.stop_words else self.eos

    @property
    def is_tokenized_whole(self) -> bool:
        """False: prompts and answers are tokenised each on their own, as users of named templates know it."""
        return False

    @property
    def identity(self) -> Mapping[str, object]:
        """Markup and options, and the day where the tool format names it."""
        names_day = getattr(self.tool_format, "NAMES_DAY", False)
        return asdict(self) | ({"day": today().isoformat()} if names_day else {})

    @property
    def tool_format(self) -> ToolFormat:
        """Writes and reads the tool calls of this template."""
        return find_tool_format(self.tool_format_name or self.record.tool_format)

    def render(self, conversation: Conversation) -> Sequence[tuple[Turn, ...]]:
        """One sequence of turns, or one for each answer; messages after the last answer are left out."""
        answers, _ = self._write(conversation, leaves_past_thoughts=False)
        if self.is_bare or not answers:
            return [self._turns(answers)]
        ends = [self._end(answer, following) for answer, following in zip(answers, [*answers[1:], None], strict=True)]
        if self._is_shown_as_generated(conversation, answers, ends):
            return [self._turns(with_ends(answers, ends))]
        return [self._alone(conversation, *pair) for pair in zip(answers, ends, strict=True)]

    def _is_shown_as_generated(
        self, conversation: Conversation, answers: Sequence[Answer], ends: Sequence[AnswerEnd]
    ) -> bool:
        """Whether one rendering holds, before each answer, what generation sees."""
        if not all(end.is_in_history for end in ends[:-1]):
            return False
        if self.preserve_thinking or not self.record.is_reasoning:
            return True
        seen, _ = self._write(until(conversation, answers[-1].message_index), leaves_past_thoughts=True)
        return [text_of(answer.pieces) for answer in seen] == [text_of(answer.pieces) for answer in answers]

    def _alone(self, conversation: Conversation, answer: Answer, end: AnswerEnd) -> tuple[Turn, ...]:
        """A sequence in which only this answer carries loss; what is before it is what generation sees."""
        shown = until(conversation, answer.message_index)
        written, _ = self._write(shown, leaves_past_thoughts=not self.preserve_thinking)
        last = written[-1]._replace(answer=written[-1].answer + end.pieces)
        return (*self._turns(written[:-1], trainable=False), *self._turns([last]))

    def _turns(self, answers: Sequence[Answer], *, trainable: bool = True) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        for written in answers:
            asked, answer = written.question, written.answer
            if self.enable_thinking:
                answer = written.empty_thought + answer
            else:
                asked = asked + written.empty_thought
            target = segments_of(answer, trainable=trainable)
            turns.append(Turn(segments_of(asked), target, written.message_index))
        return tuple(turns)

    def _end(self, answer: Answer, following: Answer | None) -> AnswerEnd:
        """What closes an answer for training, besides its slot."""
        if following is None and (answer.is_open or self.record.efficient_eos):
            return AnswerEnd(pieces=self._fill("{{eos}}", []))
        if following is None or not answer.is_open:
            return AnswerEnd(pieces=[])
        question = text_of(following.question)
        if stop := next((word for word in self.stop_words if word and question.startswith(word)), ""):
            return AnswerEnd(pieces=[Piece(stop)])
        return AnswerEnd(pieces=self._fill("{{eos}}", []), is_in_history=False)

    def _closes(self, slot: str) -> bool:
        """Whether a slot ends with what stops generation."""
        return _ends_with_stop(slot, self.bos, self.end_token, (self.eos, *self.stop_words))

    def render_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The text before the next answer."""
        answers, question = self._write(conversation, leaves_past_thoughts=not self.preserve_thinking)
        pieces = [piece for written in answers for piece in written.pieces] + question
        return segments_of(pieces + (markup(self.record.empty_thought) if self.enable_thinking is False else []))

    def _write(self, conversation: Conversation, *, leaves_past_thoughts: bool) -> tuple[list[Answer], list[Piece]]:
        """All answers, each with what is before it, and what is behind the last one."""
        messages = conversation.messages
        last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
        num_past = last_user if leaves_past_thoughts else 0
        answers: list[Answer] = []
        question, system = self._opening(conversation)
        for start, group in role_groups(messages):
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
        content = literal(text) + (self._describe(tools) if tools else [])
        prefix = self._fill(self.record.prefix, [])
        system = self._fill(self.record.system, content) if content or tools is not None else []
        if self.record.system_in_user and any(message.role == "user" for message in messages):
            return prefix, system
        return prefix + system, []

    def _describe(self, tools: Sequence[Mapping[str, object]]) -> list[Piece]:
        if self.record.tools is None or self.tool_format_name:
            return self.tool_format.describe_tools(tools)
        return self._fill(self.record.tools, literal(json.dumps(list(tools), ensure_ascii=False)))

    def _question(self, group: Sequence[Message], system: Sequence[Piece]) -> list[Piece]:
        if group[0].role == "system":
            return []
        if group[0].role == "user":
            contents = [[*(system if place == 0 else ()), *literal(m.content)] for place, m in enumerate(group)]
            return [piece for content in contents for piece in self._fill(self.record.user, content)]
        slot = self.record.user if self.record.observation is None else self.record.observation
        return self._fill(slot, self.tool_format.join_results([message.content for message in group]))

    def _answer(self, message: Message, index: int, question: list[Piece], *, is_past: bool) -> Answer:
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
        is_open = not self._closes(slot) and (record.efficient_eos or self._closes(record.assistant))
        return Answer(
            message_index=index, question=question, empty_thought=markup(empty), answer=pieces, is_open=is_open
        )

    def _spoken(self, text: str) -> list[Piece]:
        """The text of an answer, in which the words around a thought are markup."""
        if not self.record.is_reasoning:
            return literal(text)
        words = [word.strip() for word in self.record.thought_words]
        match = _thought_pattern(*words).search(text)
        if match is None:
            return literal(text)
        sides = [literal(side) for side in (text[: match.start()], match[1], text[match.end() :])]
        return [*sides[0], Piece(words[0]), *sides[1], Piece(words[1]), *sides[2]]

    def _fill(self, slot: str, content: Sequence[Piece]) -> list[Piece]:
        """The slot with its placeholders filled; markup and row text stay apart."""
        return _fill(slot, self.bos, self.end_token, content)


def _fill(slot: str, bos: str, eos: str, content: Sequence[Piece]) -> list[Piece]:
    pieces: list[Piece] = []
    for piece in _parts(slot, bos, eos):
        if piece is None:
            pieces += [one for one in content if one.text]
        else:
            pieces.append(piece)
    return pieces


@cache
def _parts(slot: str, bos: str, eos: str) -> Sequence[Piece | None]:
    """The markup of a slot; None where the content goes."""
    named = {"content": "", "bos": bos, "eos": eos}
    parts: list[Piece | None] = []
    for place, text in enumerate(_PLACEHOLDER.split(slot)):
        if place % 2 and text == "content":
            parts.append(None)
        elif written := named[text] if place % 2 else text:
            parts.append(Piece(written))
    return parts


@cache
def _ends_with_stop(slot: str, bos: str, eos: str, stops: tuple[str, ...]) -> bool:
    return text_of(_fill(slot, bos, eos, [])).rstrip().endswith(tuple(word for word in stops if word))


@cache
def _thought_pattern(opening: str, closing: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(opening)}(.*?){re.escape(closing)}", re.DOTALL)
