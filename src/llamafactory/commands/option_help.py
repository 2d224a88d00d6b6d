"""`COMMAND --help`: every option with type, default and meaning, grouped as its section says."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from llamafactory.compose import all_sections
from llamafactory.hparams.section import Section, allowed_text, default_of, group_of, iter_fields

_WIDTH = 110
_SECTIONS_OF = {
    "chat": ("model", "data", "generation", "finetuning_type: "),
    "score": ("model", "data", "finetuning_type: "),
    "export": ("model", "data", "export", "finetuning_type: "),
    "train": ("model", "data", "train", "generation", "stage: ", "finetuning_type: "),
    "plan": ("model", "data", "train", "stage: ", "finetuning_type: "),
}
PLAN_WORDS = (
    ("--device NAME", "plan for another device: h100-80g, a100-40g, rtx4090-24g, l4, t4, mi300x, cpu, cpu-64g, ..."),
    ("--num-devices N", "devices that train together, each with a copy of the model"),
    ("--json", "print one JSON object: bytes, seconds, FLOPs"),
)
_EXTRA_KEYS = {"score": ("train", ("per_device_eval_batch_size", "use_cpu", "bf16", "fp16", "pure_bf16"))}
"""Single keys that a command reads of a section whose other keys mean nothing to it."""
_OWN_WORDS = {
    "train": (
        ("--rerun FILE", "run the run of this run.json again, into output_dir or <old folder>-rerun"),
        ("--allow-change KEY", "continue a run although KEY has changed; data lets the rows differ"),
    ),
    "check": (
        ("--command NAME", "the command that shall run it: train, chat, score or export; without it: as its keys say"),
        ("--json", "print one JSON object"),
        ("--schema", "print the JSON Schema of all options, for an editor"),
    ),
    "plan": PLAN_WORDS,
    "score": (
        ("--output FILE", "write the lines there, and not to standard output"),
        ("--json", "print what the scores are in sum as one JSON object; wants --output"),
    ),
}


def render_help(command: str, summary: str, words: Sequence[str] = ()) -> str:
    """The help of one command; `words` stood behind it and may name a sub-command."""
    if command == "data":
        from llamafactory.commands import data_help

        return data_help.render_help(words)
    if command == "runs":
        from llamafactory.commands.runs import HELP

        return f"llamafactory-cli runs: {summary}\n\n{HELP}"
    if command == "env":
        return f"llamafactory-cli env: {summary}\n\nIt takes no options."
    lines = [f"llamafactory-cli {command}: {summary}", ""]
    lines += [
        f"usage: llamafactory-cli {command} [CONFIG.yaml] [key=value ...]",
        "",
        "Options can be written key=value, --key value, --key=value or --flag.",
    ]
    if command in _OWN_WORDS:
        lines += ["", *(f"  {word:<20}{text}" for word, text in _OWN_WORDS[command])]
    wanted = _SECTIONS_OF.get(command, ("",))
    for name, section in all_sections().items():
        if name.startswith(wanted):
            lines += _render_section(name, section)
        elif command in _EXTRA_KEYS and name == _EXTRA_KEYS[command][0]:
            lines += _render_section(name, section, only=_EXTRA_KEYS[command][1])
    return "\n".join(lines)


def _render_section(name: str, section: type[Section], only: Sequence[str] = ()) -> Iterator[str]:
    group = None
    for key, field in iter_fields(section):
        if only and key not in only:
            continue
        if group_of(field) != group:
            group = group_of(field)
            yield ""
            yield f"{group} ({name})" if ": " in name else group
        yield f"  {key} = {_shown(default_of(field))}"
        text = f"{field.description} [{allowed_text(field)}]"
        yield from textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)
