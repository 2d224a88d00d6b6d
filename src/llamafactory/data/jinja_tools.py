"""How tool syntaxes are said in Jinja: descriptions of tools and calls. Syntaxes that are not listed here cannot be.

The constant texts are those that the syntax itself writes. Names that a snippet reads: `tools` (as in OpenAI's
protocol, with or without the wrapper) or `calls` (the message's `tool_calls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llamafactory.data.tool_formats import ToolFormat

_EACH_TOOL = "{%- for tool in tools -%}{%- set tool = tool.function | default(tool) -%}"
_EACH_CALL = (
    "{%- for call in calls -%}{%- set call = call.function | default(call) -%}{%- set given = call.arguments -%}"
    "{%- set text = given if given is string else given | tojson -%}"
)
_END = "{%- endfor -%}"
_WRAPPED = '{"type": "function", "function": tool}'
_WRAPPED_JSON, _JSON = "{{- " + _WRAPPED + " | tojson -}}", "{{- tool | tojson -}}"
_TODAY = re.compile(r"\d\d [A-Z][a-z]{2} \d{4}")
_PROBE: Mapping[str, object] = {"name": "probe", "parameters": {}}


@dataclass(frozen=True, kw_only=True, slots=True)
class JinjaTools:
    """Two snippets; empty where the syntax is not known in Jinja."""

    describe: str = ""
    calls: str = ""


def quoted(text: str) -> str:
    """Jinja that writes this text, whatever it holds; nothing for an empty text."""
    return f"{{{{- {literal_of(text)} -}}}}" if text else ""


def literal_of(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def tools_in_jinja(name: str, tool_format: ToolFormat) -> JinjaTools:
    """The snippets of a tool syntax; empty ones where it has none."""
    find = _SNIPPETS.get(name)
    return find(tool_format) if find else JinjaTools()


def listed_tools(head: str, tail: str) -> str:
    """A JSON list of bare tools between two texts."""
    return quoted(head + "[") + _EACH_TOOL + _between(", ") + "{{- tool | tojson -}}" + _END + quoted("]" + tail)


def _between(text: str) -> str:
    return "{%- if not loop.first -%}" + quoted(text) + "{%- endif -%}"


def _ends(tool_format: ToolFormat) -> tuple[str, str]:
    """What a syntax writes before the first tool and behind the last one."""
    pieces = tool_format.describe_tools([_PROBE])
    return pieces[0].text, "" if pieces[-1].is_literal else pieces[-1].text


def _json_call(key: str) -> str:
    return quoted('{"name": ') + "{{- call.name | tojson -}}" + quoted(f', "{key}": ') + "{{- text -}}" + quoted("}")


def _default(tool_format: ToolFormat) -> JinjaTools:
    before, _, middle, _, behind = (piece.text for piece in tool_format.describe_tools([_PROBE]))
    fields = (
        "{%- set schema = tool.parameters | default({}) -%}"
        "{%- for name, field in (schema.properties | default({})).items() -%}"
        + quoted("  - ")
        + "{{- name -}}"
        + quoted(" (")
        + "{{- field.type | default('') -}}"
        + "{%- if name in (schema.required | default([])) -%}"
        + quoted(", required")
        + "{%- endif -%}"
        + quoted("): ")
        + "{{- field.description | default('') -}}"
        + "{%- if field.enum -%}"
        + quoted(", should be one of [")
        + "{{- field.enum | join(', ') -}}"
        + quoted("]")
        + "{%- endif -%}{%- if field['items'] is mapping and field['items'] -%}"
        + quoted(", where each item should be ")
        + "{{- field['items'].type | default('') -}}{%- endif -%}"
        + quoted("\n")
        + _END
    )
    describe = (
        quoted(before)
        + _EACH_TOOL
        + _between("\n")
        + quoted("> Tool Name: ")
        + "{{- tool.name | default('') -}}"
        + quoted("\nTool Description: ")
        + "{{- tool.description | default('') -}}"
        + quoted("\nTool Args:\n")
        + fields
        + _END
        + quoted(middle)
        + _EACH_TOOL
        + _between(", ")
        + "{{- tool.name | default('') -}}"
        + _END
        + quoted(behind)
    )
    calls = (
        _EACH_CALL
        + _between("\n")
        + quoted("Action: ")
        + "{{- call.name -}}"
        + quoted("\nAction Input: ")
        + "{{- text -}}"
        + _END
    )
    return JinjaTools(describe=describe, calls=calls)


def _listing(entry: str, between: str) -> str:
    return _EACH_TOOL + _between(between) + entry + _END


def _calls(one: str, between: str) -> str:
    return _EACH_CALL + _between(between) + one + _END


def _qwen(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    one = quoted("<tool_call>\n") + _json_call("arguments") + quoted("\n</tool_call>")
    return JinjaTools(describe=quoted(head) + _listing(_WRAPPED_JSON, "\n") + quoted(tail), calls=_calls(one, "\n"))


def _ling(tool_format: ToolFormat) -> JinjaTools:
    head, _, *tail = tool_format.describe_tools([_PROBE])
    qwen = _qwen(tool_format)
    behind = "".join(piece.text for piece in tail)
    return JinjaTools(describe=quoted(head.text) + _listing(_WRAPPED_JSON, "\n") + quoted(behind), calls=qwen.calls)


def _mistral(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    describe = quoted(head + "[") + _listing(_WRAPPED_JSON, ", ") + quoted("]" + tail)
    return JinjaTools(describe=describe, calls=quoted("[") + _calls(_json_call("arguments"), ", ") + quoted("]"))


def _llama3(tool_format: ToolFormat) -> JinjaTools:
    head, _ = _ends(tool_format)
    before, behind = _TODAY.split(head)
    entry = "{{- " + _WRAPPED + " | tojson(indent=4) -}}" + quoted("\n\n")
    day = "{{- strftime_now('%d %b %Y') -}}"
    return JinjaTools(
        describe=quoted(before) + day + quoted(behind) + _listing(entry, ""),
        calls="{%- if calls | length > 1 -%}[{%- endif -%}"
        + _calls(_json_call("parameters"), ", ")
        + "{%- if calls | length > 1 -%}]{%- endif -%}",
    )


def _glm4(tool_format: ToolFormat) -> JinjaTools:
    head, opening, _, closing = (piece.text for piece in tool_format.describe_tools([_PROBE]))
    entry = quoted(opening) + "{{- tool.name | default('') -}}" + quoted("\n\n") + "{{- tool | tojson(indent=4) -}}"
    one = "{{- call.name -}}" + quoted("\n") + "{{- text -}}"
    return JinjaTools(describe=quoted(head) + _listing(entry + quoted(closing), ""), calls=_calls(one, "\n"))


def _glm4_moe(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    fields = _fields("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>")
    return JinjaTools(
        describe=quoted(head) + _listing(_WRAPPED_JSON, "\n") + quoted(tail),
        calls=_calls(quoted("<tool_call>") + "{{- call.name -}}" + fields + quoted("\n</tool_call>"), "\n"),
    )


def _minimax1(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    return JinjaTools(
        describe=quoted(head) + _listing(_JSON, "\n") + quoted(tail),
        calls=quoted("<tool_calls>\n") + _calls(_json_call("arguments") + quoted("\n"), "") + quoted("</tool_calls>"),
    )


def _minimax2(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    one = quoted('<invoke name="') + "{{- call.name -}}" + quoted('">\n')
    one += _fields('<parameter name="', '">', "</parameter>\n") + quoted("</invoke>")
    entry = quoted("<tool>") + _JSON + quoted("</tool>\n")
    return JinjaTools(
        describe=quoted(head) + _listing(entry, "") + quoted(tail.removeprefix("</tool>\n")), calls=_calls(one, "\n")
    )


def _seed_oss(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    one = quoted("<seed:tool_call>\n<function=") + "{{- call.name -}}" + quoted("\n")
    one += _fields("<parameter=", ">", "</parameter>\n") + quoted("</function>\n</seed:tool_call>")
    return JinjaTools(describe=listed_tools(head, tail), calls=_calls(one, "\n"))


def _qwen3_5(tool_format: ToolFormat) -> JinjaTools:
    head, tail = _ends(tool_format)
    one = quoted("<tool_call>\n<function=") + "{{- call.name -}}" + quoted(">\n")
    one += _fields("<parameter=", ">\n", "\n</parameter>\n") + quoted("</function>\n</tool_call>")
    return JinjaTools(describe=quoted(head) + _listing(_JSON, "\n") + quoted(tail), calls=_calls(one, "\n"))


def _fields(opening: str, middle: str, closing: str) -> str:
    """One entry for each argument; arguments that come as JSON text cannot be read in Jinja."""
    return (
        "{%- if given is string -%}{{- raise_exception('tool_calls: arguments must be an object here, not a text') -}}"
        "{%- endif -%}{%- for key, value in given.items() -%}"
        + quoted(opening)
        + "{{- key -}}"
        + quoted(middle)
        + "{{- value if value is string else value | tojson -}}"
        + quoted(closing)
        + _END
    )


_SNIPPETS: Mapping[str, Callable[[ToolFormat], JinjaTools]] = {
    "default": _default,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "ling": _ling,
    "llama3": _llama3,
    "minimax1": _minimax1,
    "minimax2": _minimax2,
    "mistral": _mistral,
    "qwen": _qwen,
    "qwen3_5": _qwen3_5,
    "seed_oss": _seed_oss,
}
