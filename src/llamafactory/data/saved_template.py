"""What is written beside a model so that servers write its texts as training did."""

from __future__ import annotations

from typing import Any

from llamafactory.data.chat_template import NamedTemplate, find_record, template_names
from llamafactory.data.jinja_environment import RefusedByTemplateError, compile_jinja, run_jinja
from llamafactory.data.jinja_messages import MessageStyle, as_dicts
from llamafactory.data.jinja_template import tokenizer_jinja
from llamafactory.data.jinja_writer import write_jinja
from llamafactory.data.modelfile import MODELFILE_NAME, UnwritableTemplateError, write_modelfile
from llamafactory.data.row_error import RowError
from llamafactory.data.template_choice import template_difference, template_of
from llamafactory.data.types import Conversation, Message, Template, ToolCall
from llamafactory.extras.log import note, warn
from llamafactory.hparams.data import DataConfig

CHAT_TEMPLATE_NAME = "chat_template.jinja"
_TALK = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="How are you?"),
    Message(role="assistant", content="Fine."),
    Message(role="user", content="Weather in Paris?"),
)
_CALLED = (
    *_TALK,
    Message(role="assistant", content="", tool_calls=(ToolCall(name="get_weather", arguments='{"city": "Paris"}'),)),
    Message(role="tool", content="21 degrees"),
)
_TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_PROBES = (
    Conversation(messages=_TALK),
    Conversation(messages=_TALK[1:]),
    Conversation(messages=_TALK[1:2]),
    Conversation(messages=_CALLED, tools=(_TOOL,)),
)


def chat_template_to_save(data: DataConfig, tokenizer: Any) -> str | None:
    """The Jinja of a named template, where the tokenizer has none or another; None where the tokenizer's own is right.

    Args:
        data: names the template.
        tokenizer: a transformers tokenizer.
    """
    template = template_of(data, tokenizer)
    if not isinstance(template, NamedTemplate):
        return None
    own = tokenizer_jinja(tokenizer)
    if own is not None and not template_difference(template, tokenizer, own):
        return None
    text = write_jinja(template)
    if fault := find_fault(template, text):
        warn(f"template '{template.name}' cannot be written as Jinja ({fault}), so the tokenizer is saved as it was")
        return None
    why = "the tokenizer had none" if own is None else "in place of the tokenizer's own, which writes other texts"
    note(f"template '{template.name}' is saved beside the weights as {CHAT_TEMPLATE_NAME} ({why})", once=True)
    return text


def modelfile_to_save(data: DataConfig, tokenizer: Any) -> str | None:
    """An Ollama Modelfile for the folder of a model; None, with a note why, where no right one can be written.

    With the tokenizer's own template it is that of a named one which writes the same texts.

    Args:
        data: names the template.
        tokenizer: a transformers tokenizer.
    """
    template = template_of(data, tokenizer)
    named = template if isinstance(template, NamedTemplate) else find_named(template, tokenizer)
    if named is None:
        note(f"no {MODELFILE_NAME} is written: no named template writes what the tokenizer's own does", once=True)
        return None
    try:
        text = write_modelfile(named)
    except UnwritableTemplateError as error:
        note(f"no {MODELFILE_NAME} is written for template '{named.name}': {error}", once=True)
        return None
    note(f"{MODELFILE_NAME} for Ollama is written from template '{named.name}', without tools", once=True)
    return text


def find_named(template: Template, tokenizer: Any) -> NamedTemplate | None:
    """The first named template that writes small dialogues as this one does, chatml before others; None: none does."""
    probes = [probe for probe in _PROBES if not probe.tools]
    try:
        expected = [_text(template, probe) for probe in probes]
    except RowError:  # a template that refuses system messages, say
        return None
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    default = _default_system(*expected[:2])
    for name in ("chatml", *template_names()):
        named = NamedTemplate(record=find_record(name), bos=bos, eos=eos, default_system=default)
        if [_text(named, probe) for probe in probes] == expected:
            return named
    return None


def _default_system(given: str, left_out: str) -> str:
    """The system text that a template puts in where a dialogue has none.

    Args:
        given: a dialogue with a system text.
        left_out: the same dialogue without one.
    """
    before, _, behind = given.partition(_TALK[0].content)
    is_put_in = left_out.startswith(before) and left_out.endswith(behind)
    return left_out[len(before) : len(left_out) - len(behind)] if is_put_in else ""


def _text(template: Template, conversation: Conversation) -> str:
    return "".join(segment.text for segment in template.render_prompt(conversation))


def find_fault(template: NamedTemplate, jinja: str) -> str:
    """Where Jinja writes another text than the template, for some small dialogues; empty if it does not.

    A refusal of tools is no fault: it says so to whoever asks.
    """
    compiled = compile_jinja(jinja)
    for probe in _PROBES:
        variables: dict[str, Any] = {
            "messages": as_dicts(probe.messages, MessageStyle()),
            "tools": [{"type": "function", "function": dict(tool)} for tool in probe.tools or ()] or None,
            "add_generation_prompt": True,
        }
        expected = _text(template, probe)
        try:
            written = run_jinja(compiled, variables)
        except RefusedByTemplateError as error:
            if probe.tools:
                continue
            return str(error)
        if written != expected:
            return f"{written[-80:]!r} instead of {expected[-80:]!r}"
    return ""
