"""`data preview`: rows as they will be trained, supervised text in colour or in brackets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llamafactory.commands.data_inputs import has_colour, load_inputs, print_json, split_words
from llamafactory.extras.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llamafactory.data.data_report import LostRow
    from llamafactory.data.preview import ShownExample, ShownRow

_DEFAULT_ROWS = "3"
_SUPERVISED, _MARK, _DIM, _RESET = "\x1b[30;42m", "\x1b[97;41m", "\x1b[2m", "\x1b[0m"
_NAMES = {
    "pairs": ("chosen", "rejected"),
    "ranked": ("chosen", "rejected"),
    "prompts": ("prompt", "answer of the row"),
}
_OPEN, _CLOSE, _BREAK = "⟦", "⟧", "↵"


def main(argv: list[str]) -> int:
    """Show the first rows of each data set.

    Raises:
        ConfigError: the configuration or `--rows` cannot be used.
        LlamaFactoryError: the data or the tokenizer cannot be used.
    """
    words, own = split_words("preview", argv)
    num_rows = _read_count(own.get("rows", _DEFAULT_ROWS))
    inputs = load_inputs(words)
    from llamafactory.data.preview import ShownRow, preview_rows

    records: list[dict[str, Any]] = []
    is_coloured = has_colour()
    for use, spec in inputs.datasets:
        found = preview_rows(
            spec, inputs.data, inputs.template, inputs.tokenizer, seed=inputs.seed, num_rows=num_rows, view=inputs.view
        )
        for row in found:
            if "json" in own:
                records.append({"use": use} | as_record(row, has_ids="ids" in own))
            elif isinstance(row, ShownRow):
                print("\n".join(render_row(row, is_coloured=is_coloured, has_ids="ids" in own)))
            else:
                print(f"── {row.dataset} · not used: {row.render()}\n")
    if "json" in own:
        print_json({"cutoff_len": inputs.data.cutoff_len, "template": inputs.template.name, "rows": records})
    return 0


def render_row(row: ShownRow, *, is_coloured: bool, has_ids: bool) -> Iterator[str]:
    """The lines of one row for people."""
    yield f"── {row.dataset} · {row.origin}" + (f" · not used: {row.reason}" if row.reason else "")
    count = len(row.examples)
    names = _NAMES.get(row.view, ()) if count > 1 else ()
    if count > 1 and not names:
        yield f"one row becomes {count} training sequences, because the template rewrites history"
    if row.num_left_out:
        yield f"{row.num_left_out} earlier answers are left out, because the template rewrites history"
    if row.is_liked is not None:
        yield "the answer is desirable" if row.is_liked else "the answer is undesirable"
    if row.value is not None:
        yield f"{_number_name(row)} {row.value:g}"
    for number, example in enumerate(row.examples, start=1):
        title = f"sequence {number} of {count}: " if count > 1 else ""
        title = f"{names[number - 1]}: " if names else title
        title += f"{example.num_tokens:,} tokens, {example.num_supervised:,} supervised"
        title += f", {example.num_cut:,} cut away" if example.num_cut else ""
        title += "" if example.is_used or row.reason else ", not used"
        yield f"{_DIM}{title}{_RESET}" if is_coloured else title
        yield render_text(example, is_coloured=is_coloured)
        if has_ids:
            yield from _token_lines(example)
    yield ""


def _number_name(row: ShownRow) -> str:
    return "margin" if len(row.examples) == 2 else "score"


def render_text(example: ShownExample, *, is_coloured: bool) -> str:
    """The text of an example; control characters are written as escapes, so that no row can steer the terminal."""
    parts: list[str] = []
    for span in example.spans:
        text = printable(span.text)
        if span.is_supervised and is_coloured:
            parts += [f"{_SUPERVISED}{text}{_RESET}".replace("\n", f"{_BREAK}{_RESET}\n{_SUPERVISED}")]
        else:
            parts += [_OPEN, text, _CLOSE] if span.is_supervised else [text]
        if span.num_cut_behind:
            mark = f"[-{span.num_cut_behind:,}-]"
            parts.append(f"{_MARK}{mark}{_RESET}" if is_coloured else mark)
    return "".join(parts)


def printable(text: str) -> str:
    r"""The text with control characters other than line breaks and tabs as `\x1b`; direction marks as `\u202e`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t " else _escape(one) for one in text)


def _escape(one: str) -> str:
    return f"\\x{ord(one):02x}" if ord(one) < 256 else f"\\u{ord(one):04x}"


def _token_lines(example: ShownExample) -> Iterator[str]:
    for place, token in enumerate(example.tokens):
        mark = "+" if token.is_supervised else " "
        yield f"{place:>6} {token.id:>7} {mark} {json.dumps(token.text, ensure_ascii=not token.text.isprintable())}"


def as_record(row: ShownRow | LostRow, *, has_ids: bool) -> dict[str, Any]:
    """A row with stable keys; `tokens` is null where ids were not asked for."""
    from llamafactory.data.preview import ShownRow

    if not isinstance(row, ShownRow):
        return {"dataset": row.dataset, "origin": row.origin, "reason": row.render(), "label": None, "score": None,
                "margin": None, "examples": []}  # fmt: skip
    examples = [asdict(example) for example in row.examples]
    if not has_ids:
        for example in examples:
            example["tokens"] = None
    return {
        "dataset": row.dataset,
        "origin": row.origin,
        "reason": row.reason or None,
        "num_left_out": row.num_left_out,
        "label": row.is_liked,
        "score": row.value if _number_name(row) == "score" else None,
        "margin": row.value if _number_name(row) == "margin" else None,
        "examples": examples,
    }


def _read_count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(
        Problem(key="--rows", given=text, message="not a number of rows", allowed="a whole number from 1 up")
    )
