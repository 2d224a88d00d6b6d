"""Which template a run uses: a named one, or the tokenizer's own."""

from __future__ import annotations

import difflib
import json
from typing import Any

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.encode import clean_backend
from llamafactory.data.jinja_template import JinjaTemplate, tokenizer_jinja
from llamafactory.data.row_error import RowError
from llamafactory.data.tool_formats import find_tool_format
from llamafactory.data.types import Conversation, Message, Template
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note, warn
from llamafactory.hparams.data import DataConfig

__all__ = ["build_template", "end_token", "find_record", "template_of", "template_difference"]

_MESSAGES = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="How are you?"),
    Message(role="assistant", content="Fine."),
    Message(role="user", content="Bye!"),
)


def build_template(
    name: str | None,
    tokenizer: Any,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
    tool_format: str | None = None,
    preserve_thinking: bool = False,
) -> Template:
    """The template of that name bound to the tokenizer; None or `auto`: the tokenizer's own.

    A named template that writes a small dialogue otherwise than the tokenizer's own is used as asked, and the
    difference is shown once.

    Args:
        name: a name, `auto`, or None.
        tokenizer: a transformers tokenizer.
        default_system: system text of conversations that have none; None: the template's own.
        enable_thinking: True asks the template for answers with a thought, False for answers without; None: neither.
        tool_format: syntax of tool calls of a named template; None: the template's own.
        preserve_thinking: thoughts of past turns stay before a new answer.

    Raises:
        DataError: an unknown name, `auto` with a tokenizer that has no chat template, or an option that the template
            does not know.
    """
    jinja = tokenizer_jinja(tokenizer)
    if name in (None, "auto"):
        _refuse_named_options(tool_format=tool_format)
        if jinja is None:
            raise DataError(
                "the tokenizer has no chat template",
                where="template",
                found="template: auto" if name else "no template given",
                expected="the name of a template",
                fix="set template: chatml for a base model that you teach to chat, or template: default",
            )
        if enable_thinking is not None and "enable_thinking" not in jinja:
            note("the tokenizer's chat template does not know enable_thinking, so it has no effect", once=True)
        own = JinjaTemplate(
            jinja,
            tokenizer,
            default_system=default_system,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
        )
        if stop := plain_stop(own, tokenizer):
            end = getattr(tokenizer, "eos_token", None)
            warn(
                f"the chat template ends answers with {json.dumps(stop, ensure_ascii=False)}, for which the tokenizer "
                "has no token of its own: it is read as plain text, a supervised token may reach past it, and "
                "generation does not stop there; use the tokenizer that belongs to the template, or set template: "
                f"default, which ends answers with the tokenizer's {end or 'end token'}",
                once=True,
            )
        return own
    template = NamedTemplate(
        record=find_record(name),
        bos=tokenizer.bos_token or "",
        eos=tokenizer.eos_token or "",
        default_system=default_system,
        tool_format_name=tool_format,
        enable_thinking=enable_thinking,
        preserve_thinking=preserve_thinking,
    )
    if tool_format is not None:
        find_tool_format(tool_format)
    if jinja is not None and (difference := template_difference(template, tokenizer, jinja)):
        note(
            f"template '{name}' (-) is used; the tokenizer's own (+, template: auto) writes:\n{difference}",
            once=True,
        )
    return template


def template_of(data: DataConfig, tokenizer: Any) -> Template:
    """The template that a configuration asks for; the same one in training, chat and the data commands.

    Args:
        data: names the template and its options.
        tokenizer: a transformers tokenizer.
    """
    return build_template(
        data.template,
        tokenizer,
        default_system=data.default_system,
        enable_thinking=data.enable_thinking,
        tool_format=data.tool_format,
        preserve_thinking=data.preserve_thinking,
    )


def end_token(name: str | None) -> str | None:
    """The end token that a named template puts in place of the tokenizer's own; None where it keeps that."""
    if name is None or name == "auto":
        return None
    record = find_record(name)
    return record.stop_words[0] if record.replace_eos and record.stop_words else None


def _refuse_named_options(**options: object) -> None:
    for key, value in options.items():
        if value is not None:
            raise DataError(
                "the tokenizer's own chat template decides this itself",
                where=key,
                found=f"{key}: {str(value).lower()} with template: auto",
                fix=f"leave {key} out, or name a template",
            )


def template_difference(template: NamedTemplate, tokenizer: Any, jinja: str) -> str:
    """How the tokenizer's own template writes what is before an answer otherwise, as a diff; empty if it does not."""
    try:
        own = JinjaTemplate(jinja, tokenizer, enable_thinking=template.enable_thinking)
    except DataError:
        return ""
    lines: list[str] = []
    for title, messages in (("with a system message", _MESSAGES), ("without one", _MESSAGES[1:])):
        try:
            theirs = _text(own, messages)
        except RowError:  # a template that refuses system messages, say
            continue
        ours = _text(template, messages)
        if ours.rstrip() != theirs.rstrip():
            diff = difflib.unified_diff(ours.splitlines(), theirs.splitlines(), lineterm="", n=0)
            lines += [f"  {title}:"] + [f"    {line}" for line in list(diff)[2:] if not line.startswith("@@")]
    return "\n".join(lines)


def plain_stop(template: Template, tokenizer: Any) -> str:
    """What the template writes behind a short answer, if no token of the tokenizer stands for it; else empty."""
    question, answer = _MESSAGES[1:3]
    try:
        sequences = template.render(Conversation(messages=(question, answer)))
    except RowError:  # a template that wants other dialogues
        return ""
    segments = sequences[-1][-1].answer if sequences and sequences[-1] else ()
    text = "".join(segment.text for segment in segments if segment.trainable)
    stop = text.rpartition(answer.content)[2].strip()
    known = [token.content for token in clean_backend(tokenizer).get_added_tokens_decoder().values()]
    return "" if any(word and word in stop for word in known) else stop


def _text(template: Template, messages: tuple[Message, ...]) -> str:
    return "".join(segment.text for segment in template.render_prompt(Conversation(messages=messages)))
