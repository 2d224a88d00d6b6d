"""Small rooms: past 400 lines a file is two files."""

from __future__ import annotations

from pathlib import Path

LIMIT = 400


def test_no_source_file_is_longer_than_the_limit(repo_dir: Path) -> None:
    files = sorted((repo_dir / "src").rglob("*.py"))
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    too_long = {str(path.relative_to(repo_dir)): length for path, length in lengths.items() if length > LIMIT}
    assert files
    assert too_long == {}
