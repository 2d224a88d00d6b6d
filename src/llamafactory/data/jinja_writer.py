"""A named template as Jinja, for tokenizer files: servers then write what training wrote.

The text with generation prompt is that of `NamedTemplate.render_prompt`, character by character. What cannot be said
in Jinja (some tool syntaxes) stops a request with a message, so that no wrong text is ever written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llamafactory.data.chat_template import NamedTemplate
from llamafactory.data.jinja_tools import JinjaTools, listed_tools, literal_of, quoted, tools_in_jinja
from llamafactory.data.written_answer import text_of

_PLACEHOLDER = re.compile(r"\{\{(content|bos|eos)\}\}")
_TEXT_MACRO = (
    "{%- macro text_of(content) -%}{%- if content is string -%}{{- content -}}{%- elif content -%}"
    "{%- for part in content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}\n"
)


def write_jinja(template: NamedTemplate) -> str:
    """The template as Jinja, in the dialect that transformers renders."""
    writer = _Writer(template)
    return "".join(
        [
            _TEXT_MACRO,
            writer.thought_macro(),
            writer.opening(),
            "{%- for message in messages -%}\n",
            "{%- set text = text_of(message.content) -%}\n",
            "{%- if message.role == 'user' -%}\n",
            writer.user(),
            "{%- elif message.role == 'tool' -%}\n",
            writer.observation(),
            "{%- elif message.role == 'assistant' -%}\n",
            writer.assistant(),
            "{%- elif message.role != 'system' -%}\n",
            "{{- raise_exception('unknown role: ' ~ message.role) -}}\n",
            "{%- endif -%}\n{%- endfor -%}\n",
            writer.closing(),
        ]
    )


class _Writer:
    """The parts of the text."""

    def __init__(self, template: NamedTemplate) -> None:
        self._template, self._record = template, template.record
        name = template.tool_format_name or template.record.tool_format
        self._tools = tools_in_jinja(name, template.tool_format)
        if template.record.tools is not None and not template.tool_format_name:
            before, behind = self._around(template.record.tools)
            self._tools = JinjaTools(describe=listed_tools(before, behind), calls=self._tools.calls)
        self._refusal = (
            "{{- raise_exception("
            + literal_of(f"this chat template has no tools: the tool syntax '{name}' cannot be written in Jinja")
            + ") -}}\n"
        )

    def thought_macro(self) -> str:
        """Takes thoughts out of an answer: each from its opening word to the next closing one."""
        if not self._record.is_reasoning:
            return ""
        opening, closing = self._words()
        return (
            "{%- macro spoken(text) -%}{%- set ns = namespace(out='', open='') -%}"
            f"{{%- for part in text.split({opening}) -%}}{{%- if loop.first -%}}{{%- set ns.out = part -%}}"
            f"{{%- elif {closing} in part -%}}"
            f"{{%- set ns.out = ns.out ~ part.split({closing}, 1)[1] -%}}{{%- set ns.open = '' -%}}"
            f"{{%- else -%}}{{%- set ns.open = ns.open ~ {opening} ~ part -%}}"
            "{%- endif -%}{%- endfor -%}{{- (ns.out ~ ns.open).lstrip('\\n') -}}{%- endmacro -%}\n"
        )

    def opening(self) -> str:
        """Choices, the prefix and the system text."""
        template, record = self._template, self._record
        default = record.default_system if template.default_system is None else template.default_system
        lines = [
            f"{{%- set ns = namespace(system={literal_of(default)}, last_user=-1, is_first=true) -%}}\n",
            "{%- if messages and messages[0].role == 'system' -%}"
            "{%- set ns.system = text_of(messages[0].content) -%}{%- endif -%}\n",
            "{%- for message in messages -%}{%- if message.role == 'user' -%}"
            "{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}\n",
        ]
        if record.is_reasoning:
            thinks = "false" if template.enable_thinking is False else "true"
            keeps = "true" if template.preserve_thinking else "false"
            lines += [
                f"{{%- set thinks = enable_thinking if enable_thinking is defined else {thinks} -%}}\n",
                f"{{%- set keeps = preserve_thinking if preserve_thinking is defined else {keeps} -%}}\n",
            ]
        tools = self._tools.describe or self._refusal
        lines += [
            f"{{%- set head -%}}{{{{- ns.system -}}}}{{%- if tools -%}}{tools}{{%- endif -%}}{{%- endset -%}}\n",
            "{%- set system -%}{%- if head or tools -%}",
            self._slot(record.system, "{{- head -}}"),
            "{%- endif -%}{%- endset -%}\n",
            self._slot(record.prefix, ""),
            "\n",
        ]
        is_outside = "ns.last_user < 0" if record.system_in_user else "true"
        return "".join([*lines, f"{{%- if {is_outside} -%}}{{{{- system -}}}}{{%- endif -%}}\n"])

    def user(self) -> str:
        """A user message, and what asks for an answer."""
        inside = "{%- if ns.is_first -%}{{- system -}}{%- endif -%}" if self._record.system_in_user else ""
        before, behind = self._around(self._record.user)
        return f"{quoted(before)}{inside}{{{{- text -}}}}{self._asking(behind)}\n{{%- set ns.is_first = false -%}}\n"

    def observation(self) -> str:
        """Results of tools; neighbouring ones share the slot."""
        slot = self._record.user if self._record.observation is None else self._record.observation
        before, behind = self._around(slot)
        first, second = "\ue000", "\ue001"
        between = text_of(self._template.tool_format.join_results([first, second]))
        between = between.removeprefix(first).removesuffix(second)
        return (
            "{%- if loop.first or loop.previtem.role != 'tool' -%}" + quoted(before) + "{%- endif -%}\n"
            "{{- text -}}\n"
            "{%- if loop.nextitem is defined and loop.nextitem.role == 'tool' -%}"
            + quoted(between)
            + "{%- else -%}"
            + self._asking(behind)
            + "{%- endif -%}\n"
        )

    def assistant(self) -> str:
        """An answer."""
        record = self._record
        lines = []
        if record.is_reasoning:
            opening, closing = self._words()
            past, empty = literal_of(record.past_thought), literal_of(record.empty_thought)
            lines += [
                "{%- set is_past = loop.index0 < ns.last_user and not keeps -%}\n",
                "{%- if is_past or thinks is false -%}{%- set text = spoken(text) -%}{%- endif -%}\n",
                f"{{%- if is_past -%}}{{{{- {past} -}}}}",
                f"{{%- elif {opening} not in text and {closing} not in text -%}}{{{{- {empty} -}}}}{{%- endif -%}}\n",
            ]
        calls = "{{- text -}}{%- set calls = message.tool_calls -%}" + (self._tools.calls or self._refusal)
        called = record.assistant if record.function is None else record.function
        lines += [
            "{%- if message.tool_calls -%}",
            self._slot(called, calls),
            "{%- else -%}",
            self._slot(record.assistant, "{{- text -}}"),
            "{%- endif -%}\n",
        ]
        return "".join(lines)

    def closing(self) -> str:
        """An empty thought in front of an answer that shall not think."""
        if not self._record.is_reasoning:
            return ""
        empty = quoted(self._record.empty_thought)
        return f"{{%- if add_generation_prompt and thinks is false -%}}{empty}{{%- endif -%}}\n"

    def _words(self) -> tuple[str, str]:
        opening, closing = (literal_of(word.strip()) for word in self._record.thought_words)
        return opening, closing

    def _asking(self, behind: str) -> str:
        """What is behind a question; its end, from the first stop on, only where an answer follows or is asked for."""
        template = self._template
        stops = [word for word in (template.eos, *template.stop_words) if word and word in behind]
        cut = min((behind.index(word) + len(word) for word in stops), default=0)
        cut += behind[cut:].startswith("\n")
        asks = quoted(behind[cut:])
        return quoted(behind[:cut]) + f"{{%- if not loop.last or add_generation_prompt -%}}{asks}{{%- endif -%}}"

    def _slot(self, slot: str, content: str) -> str:
        """The slot, with Jinja in the place of its content."""
        before, behind = self._around(slot)
        return quoted(before) + content + quoted(behind)

    def _around(self, slot: str) -> tuple[str, str]:
        """The markup before and behind the content of a slot, with begin and end tokens written out."""
        sides: list[Sequence[str]] = [[]]
        for place, text in enumerate(_PLACEHOLDER.split(slot)):
            if place % 2 == 0:
                sides[-1] = [*sides[-1], text]
            elif text == "content":
                sides.append([])
            else:
                sides[-1] = [*sides[-1], self._template.bos if text == "bos" else self._template.end_token]
        if len(sides) > 2:
            raise ValueError(f"template '{self._template.name}' has a slot that holds its content twice: {slot!r}")
        before, behind = ("".join(side) for side in (*sides, [])[:2])
        return before, behind
