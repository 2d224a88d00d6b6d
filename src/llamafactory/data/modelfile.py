"""A named template as an Ollama `Modelfile`: FROM, TEMPLATE (Go's text/template), SYSTEM, PARAMETER.

Ollama writes the begin token itself, joins neighbouring messages of one role, and keeps a thought apart from the text
of its answer (`.Thinking`); the template relies on all three. Tools are not written: Ollama then refuses them itself.
"""

from __future__ import annotations

import re

from llamafactory.data.chat_template import NamedTemplate

MODELFILE_NAME = "Modelfile"
_NUM_CTX = 4096
_PLACEHOLDER = re.compile(r"\{\{(content|bos|eos)\}\}")


class UnwritableTemplateError(ValueError):
    """The template cannot be said in a Modelfile; the message says why."""


def write_modelfile(template: NamedTemplate, *, source: str = ".") -> str:
    """The text of a Modelfile.

    Args:
        template: how the model writes conversations.
        source: what `FROM` names: a folder or a GGUF file, from the Modelfile's own folder.

    Raises:
        UnwritableTemplateError: another text than the template's would have to be written.
    """
    record = template.record
    system = record.default_system if template.default_system is None else template.default_system
    lines = [f"FROM {source}", "", f"TEMPLATE {_quoted(go_template(template))}", ""]
    if system:
        lines += [f"SYSTEM {_quoted(system)}", ""]
    stops = dict.fromkeys(word for word in (template.end_token, template.eos, *template.stop_words) if word)
    lines += [f'PARAMETER stop "{_stop(word)}"' for word in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {_NUM_CTX}", ""])


def go_template(template: NamedTemplate) -> str:
    """The body of TEMPLATE. Everything is written in one piece: white space in it is the template's own.

    Raises:
        UnwritableTemplateError: the begin token stands somewhere else than at the very beginning.
    """
    record = template.record
    observation = record.user if record.observation is None else record.observation
    used = [record.system, record.user, observation, record.assistant]
    if template.bos and (
        any("{{bos}}" in slot for slot in used) or "{{bos}}" in record.prefix.removeprefix("{{bos}}")
    ):
        raise UnwritableTemplateError("the begin token is repeated, and Ollama writes it once, at the beginning")
    system = "{{ if $.System }}" + _slot(template, record.system, "{{ $.System }}") + "{{ end }}"
    before, thought = _thought(template)
    inside = "{{ if $first }}" + system + "{{ $first = false }}{{ end }}" if record.system_in_user else ""
    return "".join(
        [
            _literal(_filled(template, record.prefix.removeprefix("{{bos}}"))),
            _choice(template) + "{{ $first := true }}{{ $last := -1 }}",
            '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $last = $i }}{{ end }}{{ end }}',
            "{{ if lt $last 0 }}" + system + "{{ end }}" if record.system_in_user else system,
            '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}',
            _slot(template, record.user, inside + "{{ .Content }}"),
            '{{ else if eq .Role "tool" }}',
            _slot(template, observation, "{{ .Content }}"),
            '{{ else if eq .Role "assistant" }}',
            before + _slot(template, record.assistant, thought + "{{ .Content }}"),
            "{{ end }}{{ end }}",
            _closed_thought(template),
        ]
    )


def _thought(template: NamedTemplate) -> tuple[str, str]:
    """What stands before an answer without a thought, and its thought, which begins its text.

    Once its turn is past, an answer is shown without its thought, unless thoughts are kept.
    """
    record = template.record
    if not record.is_reasoning:
        return "", ""
    opening, closing = (_literal(word) for word in record.thought_words)
    shown = "and $thinks .Thinking" if template.preserve_thinking else "and $thinks .Thinking (gt $i $last)"
    past = "" if template.preserve_thinking else f"if lt $i $last }}}}{_literal(record.past_thought)}{{{{ else "
    empty = f"{{{{ {past}if not (and $thinks .Thinking) }}}}{_literal(record.empty_thought)}{{{{ end }}}}"
    return empty, f"{{{{ if {shown} }}}}{opening}{{{{ .Thinking }}}}{closing}{{{{ end }}}}"


def _closed_thought(template: NamedTemplate) -> str:
    """An empty thought before an answer that shall not think."""
    if not template.record.is_reasoning:
        return ""
    return "{{ if not $thinks }}" + _literal(template.record.empty_thought) + "{{ end }}"


def _choice(template: NamedTemplate) -> str:
    """Whether answers think: what the request says, else what the configuration said."""
    if not template.record.is_reasoning:
        return ""
    if template.enable_thinking is False:
        return "{{ $thinks := and $.IsThinkSet $.Think }}"
    return "{{ $thinks := or (not $.IsThinkSet) $.Think }}"


def _slot(template: NamedTemplate, slot: str, content: str) -> str:
    before, _, behind = slot.partition("{{content}}")
    return _literal(_filled(template, before)) + content + _literal(_filled(template, behind))


def _filled(template: NamedTemplate, text: str) -> str:
    return _PLACEHOLDER.sub(lambda match: template.end_token if match[1] == "eos" else template.bos, text)


def _literal(text: str) -> str:
    """Text that Go writes as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UnwritableTemplateError('a Modelfile has no way to write """')
    return f'"""{text}"""'


def _stop(word: str) -> str:
    if '"' in word or "\n" in word:
        raise UnwritableTemplateError(f"a Modelfile has no way to write the stop word {word!r}")
    return word
