"""Writes the table of chat templates in `docs/reference/templates.md`.

python scripts/list_templates.py [--check]        # --check writes nothing and fails if the page is not current
"""

from __future__ import annotations

import sys
from pathlib import Path

from llamafactory.data.chat_template import find_record, template_names
from llamafactory.data.templates.index import read_entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "templates.md"
_HEAD = """\
# Chat templates

`template: auto` uses the chat template that the tokenizer brings. The names below are for models without one, and for
configs that name one. Each is an entry in `src/llamafactory/data/templates/`; what it does not say, it inherits from
the entry that it extends. "Thinks" marks models whose answers may start with a thought (`enable_thinking`).

Named templates write what LLaMA Factory 0.9 writes, so that its configs train the same texts. Some published templates
write otherwise. Where a tokenizer brings one, the difference is shown at start, and `template: auto` follows it:

| name | the published template |
|---|---|
| `deepseekr1` | opens a thought (`<think>`) before an answer |
| `gemma4` | has no default system text, and writes `<\\|think\\|>` only where thinking is asked for |
| `glm4_moe` | without thinking: `/nothink` behind the user's text, and `<think></think>` before an answer |
| `gpt_oss` | describes date and channels in the system text, which becomes a developer message |
| `lfm2` | starts with the begin token, and has no default system text |
| `llama3` | 3.1 and later: the system text starts with two dates, and is there always |
| `qwen3_5`, `qwen3_6` | opens a thought before an answer where thinking is wanted |

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
    if "--check" not in words:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
    print("current" if is_current else f"{PAGE} is not current: run python scripts/list_templates.py")
    return 0 if is_current else 1


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
