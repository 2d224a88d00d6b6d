"""What the scripts that write pages of `docs/reference` share: write the page, or check that it is current."""

from __future__ import annotations

from pathlib import Path


def write_or_check(words: list[str], path: Path, text: str, *, command: str) -> int:
    """Writes the page; with `--check` among the words, compares only.

    Args:
        words: the words of the command line.
        path: the page.
        text: what it should hold.
        command: what a person runs to write it.

    Returns:
        0, or 1 where `--check` finds another text.
    """
    if "--check" not in words:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return 0
    is_current = path.is_file() and path.read_text(encoding="utf-8") == text
    print("current" if is_current else f"{path} is not current: run {command}")
    return 0 if is_current else 1
