"""The tokenizer's own chat template, with the exact spans of its answers (`template: auto`).

The rule is what inference sees: an answer is trained as `render(history, generation prompt) + answer + stop`. Where
one rendering of the whole dialogue satisfies that for every answer it becomes one sequence, else each answer becomes a
sequence of its own. Spans are found by rendering prefixes of the dialogue, never by searching for markers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llamafactory.data.answer_span import AnswerSpan, Rendered, find_answer
from llamafactory.data.day import today
from llamafactory.data.encode import clean_backend, special_token_pattern
from llamafactory.data.jinja_environment import RefusedByTemplateError, compile_jinja, jinja_variables, run_jinja
from llamafactory.data.jinja_messages import MessageStyle, as_dicts, find_style, row_texts, write_tools_as_text
from llamafactory.data.literal_spans import find_literal_spans, mark_content
from llamafactory.data.row_error import RowError
from llamafactory.data.tool_formats import ToolFormat, find_tool_format
from llamafactory.data.types import Conversation, Message, Segment, Turn
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note, warn

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OTHER_TEMPLATE = "name a template, such as template: chatml"


def tokenizer_jinja(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several named ones the `default`; None if it has none."""
    jinja = getattr(tokenizer, "chat_template", None)
    if isinstance(jinja, Mapping):
        jinja = jinja.get("default")
    return jinja if isinstance(jinja, str) and jinja.strip() else None


class JinjaTemplate:
    """A `Template` that writes what the tokenizer's `apply_chat_template` writes."""

    def __init__(
        self,
        jinja: str,
        tokenizer: Any,
        *,
        default_system: str | None = None,
        enable_thinking: bool | None = None,
        preserve_thinking: bool = False,
    ) -> None:
        """Compile the template and find out which shape of messages it wants.

        Args:
            jinja: the template's text.
            tokenizer: where the special tokens come from.
            default_system: system text for conversations without one; None: the template decides.
            enable_thinking: passed on to the template; None is not, so that the template decides.
            preserve_thinking: passed on to the template if True.

        Raises:
            DataError: not valid Jinja, or a template that does not know `preserve_thinking`.
        """
        self._compiled = compile_jinja(jinja)
        self._jinja = jinja
        known = jinja_variables(jinja)
        self._variables: dict[str, Any] = {
            key: str(value) for key in _TOKENS if (value := getattr(tokenizer, key, None)) is not None
        }
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking
        if preserve_thinking:
            _require_preserve_thinking(known)
            self._variables["preserve_thinking"] = True
        self._special = special_token_pattern(clean_backend(tokenizer))
        self._default_system = default_system
        self._style = find_style(self._try)

    @property
    def name(self) -> str:
        """`auto`, as users write it."""
        return "auto"

    @property
    def stop_words(self) -> tuple[str, ...]:
        """None: answers end with the tokenizer's own end tokens."""
        return ()

    @property
    def is_tokenized_whole(self) -> bool:
        """True: ids are those that `apply_chat_template` gives."""
        return True

    @property
    def identity(self) -> Mapping[str, object]:
        """The template's text, what it is given, and the day where it asks for that."""
        identity = {"jinja": self._jinja, "given": self._variables, "default_system": self._default_system}
        return identity | ({"day": today().isoformat()} if "strftime_now" in self._jinja else {})

    @property
    def tool_format(self) -> ToolFormat | None:
        """What writes tool calls where the template itself does not; None where it does."""
        return find_tool_format("default") if self._style.has_no_tools else None

    def render(self, conversation: Conversation) -> Sequence[tuple[Turn, ...]]:
        """All answers in one sequence where history stays as it was written, else one sequence an answer.

        Raises:
            RowError: the template refuses the conversation, or leaves open where an answer begins.
        """
        places = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
        shown = self._complete(conversation)
        shift = len(shown.messages) - len(conversation.messages)
        spans = [self._answer(shown, place + shift) for place in places]
        if any(_has_no_stop(span, shown.messages[place + shift]) for span, place in zip(spans, places, strict=True)):
            warn(
                "the tokenizer's chat template writes no end behind an answer, so a model may not learn to stop; "
                f"if it does not stop, {_OTHER_TEMPLATE}",
                once=True,
            )
        if (joined := _join(spans, places)) is not None:
            return [joined] if joined else []
        return [(_turn(span, place),) for span, place in zip(spans, places, strict=True)]

    def render_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """History and generation prompt."""
        rendered = self._render(self._complete(conversation), generation_prompt=True)
        return _segments(rendered, 0, len(rendered.text), trainable=False)

    def _answer(self, shown: Conversation, place: int) -> AnswerSpan:
        """Prompt and answer of the assistant message at `place`."""
        prompt = self._render(replace(shown, messages=shown.messages[:place]), generation_prompt=True)
        full = self._render(replace(shown, messages=shown.messages[: place + 1]), generation_prompt=False)
        span = find_answer(prompt, full, shown.messages[place])
        if span is None:
            raise RowError(
                "ambiguous answer span",
                field=f"messages[{place}]",
                found="a chat template that does not write this answer behind its own generation prompt",
                expected="render(history, generation prompt) + answer + stop",
                fix=_OTHER_TEMPLATE,
            )
        return span

    def _complete(self, conversation: Conversation) -> Conversation:
        """The conversation with the default system text and, where the template knows no tools, with tools as text."""
        messages, tools = list(conversation.messages), conversation.tools
        if self._default_system and not (messages and messages[0].role == "system"):
            messages.insert(0, Message(role="system", content=self._default_system))
        if self._style.has_no_tools and (tools or any(message.tool_calls for message in messages)):
            note(
                "the tokenizer's chat template writes no tools; they are written as plain text (Action: ...)",
                once=True,
            )
            messages, tools = write_tools_as_text(messages, tools, find_tool_format("default")), None
        return replace(conversation, messages=tuple(messages), tools=tools)

    def _render(self, conversation: Conversation, *, generation_prompt: bool) -> Rendered:
        """The rendering; with the spans of row text if a special-token string occurs in some."""
        messages, tools = conversation.messages, conversation.tools
        text = self._write(messages, tools, generation_prompt=generation_prompt)
        special = self._special
        if special is None or not any(special.search(found) for found in row_texts(messages, tools)):
            return Rendered(text=text)
        marked = self._try(mark_content(messages), tools, self._style, generation_prompt=generation_prompt)
        spans = None if marked is None else find_literal_spans(text, marked)
        if spans is None or _hides_special(special, conversation):
            raise RowError(
                "a special token inside a text",
                field="messages",
                found="a special-token string that this chat template moves or rewrites",
                expected="text that can be told from the template's own markup",
                fix=f"remove the string from the row, or {_OTHER_TEMPLATE}",
            )
        return Rendered(text=text, literals=spans)

    def _write(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None, *, generation_prompt: bool
    ) -> str:
        try:
            return self._run(messages, tools, self._style, generation_prompt)
        except RefusedByTemplateError as error:
            raise RowError(
                "the tokenizer's chat template refuses the row",
                field="messages",
                found=str(error)[:200],
                expected="a conversation that the template accepts",
                fix=_OTHER_TEMPLATE,
            ) from error

    def _try(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        style: MessageStyle,
        *,
        generation_prompt: bool = False,
    ) -> str | None:
        try:
            return self._run(messages, tools, style, generation_prompt)
        except RefusedByTemplateError:
            return None

    def _run(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        style: MessageStyle,
        generation_prompt: bool,
    ) -> str:
        return run_jinja(
            self._compiled,
            {
                **self._variables,
                "messages": as_dicts(messages, style),
                "tools": [{"type": "function", "function": dict(tool)} for tool in tools or ()] or None,
                "documents": None,
                "add_generation_prompt": generation_prompt,
            },
        )


def _require_preserve_thinking(known: frozenset[str]) -> None:
    if "preserve_thinking" not in known:
        raise DataError(
            "the tokenizer's own chat template decides this itself",
            where="preserve_thinking",
            found="preserve_thinking: true, and a template that does not know this variable",
            fix="leave preserve_thinking out, or name a template",
        )


def _hides_special(special: Any, conversation: Conversation) -> bool:
    """Whether a special-token string is where the markers do not reach: in a call or in a tool."""
    silent = [replace(message, content="") for message in conversation.messages]
    return any(special.search(text) for text in row_texts(silent, conversation.tools))


def _has_no_stop(span: AnswerSpan, message: Message) -> bool:
    content = message.content.rstrip()
    return bool(content) and not message.tool_calls and span.full.text[span.start : span.stop].endswith(content)


def _join(spans: Sequence[AnswerSpan], places: Sequence[int]) -> tuple[Turn, ...] | None:
    """One sequence with all turns; None if some answer was written otherwise later."""
    turns: list[Turn] = []
    done = 0
    for number, (span, place) in enumerate(zip(spans, places, strict=True)):
        if number and not span.prompt.text.startswith(spans[number - 1].full.text[:done]):
            return None
        turns.append(_turn(span, place, begin=done, has_tail=number == len(spans) - 1))
        done = span.stop
    return tuple(turns)


def _turn(span: AnswerSpan, place: int, *, begin: int = 0, has_tail: bool = True) -> Turn:
    """The turn of a span whose prompt is new from `begin` on; `has_tail` adds the white space behind its stop."""
    answer = _segments(span.full, span.start, span.stop, trainable=True)
    tail = _segments(span.full, span.stop, len(span.full.text), trainable=False) if has_tail else ()
    prompt = _segments(span.prompt, begin, len(span.prompt.text), trainable=False)
    return Turn(prompt=prompt, answer=(*answer, *tail), message_index=place)


def _segments(rendered: Rendered, start: int, stop: int, *, trainable: bool) -> tuple[Segment, ...]:
    """`text[start:stop]`, cut where row text begins and ends."""
    inside = [
        (max(first, start), min(last, stop)) for first, last in rendered.literals if last > start and first < stop
    ]
    segments, end = [], start
    for first, last in [*inside, (stop, stop)]:
        if first > end:
            segments.append(Segment(text=rendered.text[end:first], trainable=trainable))
        if last > first:
            segments.append(Segment(text=rendered.text[first:last], trainable=trainable, is_literal=True))
        end = max(end, last)
    return tuple(segments)
