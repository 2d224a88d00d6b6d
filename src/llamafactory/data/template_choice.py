"""Which template a run uses: a named one, or the tokenizer's own."""

from __future__ import annotations

import difflib
from typing import Any

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.jinja_template import JinjaTemplate, tokenizer_jinja
from llamafactory.data.types import Conversation, Message, Template
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note

__all__ = ["build_template", "find_record", "template_difference"]

_DIALOGUE = Conversation(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="How are you?"),
        Message(role="assistant", content="Fine."),
        Message(role="user", content="Bye!"),
        Message(role="assistant", content="See you."),
    )
)


def build_template(
    name: str | None, tokenizer: Any, *, default_system: str | None = None, enable_thinking: bool | None = True
) -> Template:
    """The template of that name bound to the tokenizer; None or `auto`: the tokenizer's own.

    A named template that writes a small dialogue otherwise than the tokenizer's own is used as asked, and the
    difference is shown once.

    Args:
        name: a name, `auto`, or None.
        tokenizer: a transformers tokenizer.
        default_system: system text of conversations that have none; None: the template's own.
        enable_thinking: False asks the template for answers without a thought; None and True leave the template's way.

    Raises:
        DataError: an unknown name, or `auto` with a tokenizer that has no chat template.
    """
    jinja = tokenizer_jinja(tokenizer)
    if name in (None, "auto"):
        if jinja is None:
            raise DataError(
                "the tokenizer has no chat template",
                where="template",
                found="template: auto" if name else "no template given",
                expected="the name of a template",
                fix="set template: chatml for a base model that you teach to chat, or template: default",
            )
        return JinjaTemplate(jinja, tokenizer, default_system=default_system, enable_thinking=enable_thinking)
    template = NamedTemplate(
        record=find_record(name),
        bos=tokenizer.bos_token or "",
        eos=tokenizer.eos_token or "",
        default_system=default_system,
    )
    if jinja is not None and (difference := template_difference(template, tokenizer, jinja)):
        note(
            f"template '{name}' (-) is used; the tokenizer's own (+, template: auto) writes:\n{difference}",
            once=True,
        )
    return template


def template_difference(template: Template, tokenizer: Any, jinja: str) -> str:
    """How the tokenizer's own template writes a fixed dialogue otherwise, as a diff; empty if it does not."""
    texts = []
    for candidate in (template, None):
        try:
            used = candidate or JinjaTemplate(jinja, tokenizer)
            texts.append([_text(used, with_system) for with_system in (True, False)])
        except DataError:
            return ""
    lines: list[str] = []
    for title, ours, theirs in zip(("with a system message", "without one"), *texts, strict=True):
        if ours.rstrip() != theirs.rstrip():
            diff = difflib.unified_diff(ours.splitlines(), theirs.splitlines(), lineterm="", n=0)
            lines += [f"  {title}:"] + [f"    {line}" for line in list(diff)[2:] if not line.startswith("@@")]
    return "\n".join(lines)


def _text(template: Template, with_system: bool) -> str:
    messages = _DIALOGUE.messages if with_system else _DIALOGUE.messages[1:]
    turns = template.render(Conversation(messages=messages))[-1]
    return "".join(segment.text for turn in turns for segment in (*turn.prompt, *turn.answer))
