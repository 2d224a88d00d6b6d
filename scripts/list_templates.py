"""Writes the table of chat templates in `docs/reference/templates.md`.

python scripts/list_templates.py [--check]        # --check writes nothing and fails if the page is not current
"""

from __future__ import annotations

import sys
from pathlib import Path

from reference_page import write_or_check

from llamafactory.data.chat_template import find_record, template_names
from llamafactory.data.templates.index import read_entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "templates.md"
_HEAD = """\
# Chat templates

`template: auto` uses the chat template that the tokenizer brings. The names below are for models without one, and for
configs that name one. Each is an entry in `src/llamafactory/data/templates/`; what it does not say, it inherits from
the entry that it extends. "Thinks" marks models whose answers may start with a thought (`enable_thinking`).

Named templates write what LLaMA Factory 0.9 writes, so that its configs train the same texts; only the tool texts of
`glm4_moe`, `glm4_5v`, `glm4_7` and `aeva` follow the published template of GLM-4.5 instead. Some published templates
write otherwise. Where a tokenizer brings one, the difference is shown at start, and `template: auto` follows it
([what auto does with each](auto_templates.md), [each difference](published_templates.md)):

| name | the published template |
|---|---|
| `deepseekr1` | opens a thought (`<think>`) before an answer |
| `gemma4` | has no default system text, and writes `<\\|think\\|>` only where thinking is asked for |
| `glm4_moe` | tools before the system text; `<think></think>` for no thought; `/nothink` behind the user's text |
| `gpt_oss` | describes date and channels in the system text, which becomes a developer message |
| `lfm2` | starts with the begin token, and has no default system text |
| `llama3` | 3.1 and later: the system text starts with two dates, and is there always |
| `qwen3_5`, `qwen3_6` | opens a thought before an answer where thinking is wanted |

Training sees what generation sees ([what carries loss](../data.md#what-carries-loss)): every answer is trained with a
stop behind it. Where the slots write none, it is the stop word that the next question begins with (`<|user|>` of
GLM) or the tokenizer's end token, as LLaMA Factory does (`efficient_eos`). Only `empty` writes nothing but the texts,
and no stop.

Three names of LLaMA Factory are left out, and an error says so: `hy_dense_1_8b`, `hy_dense_7b` and `moss_vl`. What
they write could not be compared with anything, and a template that is guessed is worse than none. `template: auto`
trains those models with the template that they bring.

A named template goes with the model: it is saved as `chat_template.jinja` where the tokenizer has none or another one
(all templates; the tool syntaxes `gemma4` and `lfm2` cannot be written in Jinja, so there a request with tools is
refused with a message), and `export` writes an Ollama `Modelfile` (without tools; not for `llama2`, `llama2_zh`,
`seed_coder` and `seed_oss`, which repeat the begin token that Ollama writes once). Both are rendered in tests and
equal the template's text.

<!-- The table is written by scripts/list_templates.py. -->

| name | extends | tool format | stop words | thinks |
|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    return _HEAD + "".join(_row(name) for name in template_names())


def main(words: list[str]) -> int:
    """Writes or checks the page.

    Returns:
        0, or 1 where `--check` finds another text.
    """
    return write_or_check(words, PAGE, page(), command="python scripts/list_templates.py")


def _row(name: str) -> str:
    record = find_record(name)
    parent = read_entry(name).get("extends", "")
    cells = [f"`{name}`", f"`{parent}`" if parent else "", f"`{record.tool_format}`"]
    stops = " ".join(_code(word) for word in record.stop_words)
    return f"| {' | '.join(cells)} | {stops} | {'yes' if record.is_reasoning else ''} |\n"


def _code(text: str) -> str:
    """Code in a table cell: a bar inside would end the cell."""
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
