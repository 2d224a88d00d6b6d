"""The page of guarantees names tests; each of them exists, in the file that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = "docs/guarantees.md"


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists(repo_dir: Path) -> None:
    words = set(re.findall(r"`([^`\n]*test_[^`\n]*)`", (repo_dir / PAGE).read_text(encoding="utf-8")))
    files = {word for word in words if word.endswith(".py")}
    named = {word for word in words if re.fullmatch(r"test_\w+", word)}
    defined = set[str]().union(*(functions(path) for path in (repo_dir / "tests").rglob("test_*.py")))
    assert len(named) > 30
    assert sorted(named - defined) == []
    assert [name for name in sorted(files) if not (repo_dir / name).is_file()] == []


def test_each_level_states_its_tests_and_its_limits(repo_dir: Path) -> None:
    page = (repo_dir / PAGE).read_text(encoding="utf-8")
    sections = {part.split(":")[0]: part for part in page.split("\n## ")[1:]}
    for level in ("P0", "P1", "P2", "P3"):
        assert re.search(r"^Tests[,:]", sections[level], re.M), level
        assert re.search(r"^Limits:", sections[level], re.M), level
        assert re.search(r"`test_\w+`", sections[level]), level
