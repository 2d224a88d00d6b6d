"""The README tells the truth: its commands exist, its tree is the real one, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREE_LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[\w.\-/]+)(?:\s{2,}.*)?$")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


@pytest.fixture(scope="module")
def readme(repo_dir: Path) -> str:
    path = repo_dir / "README.md"
    if not path.is_file():
        pytest.skip("README.md is not written yet")
    return path.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command line in a shell block; `$ ` and environment settings in front are dropped."""
    for language, body in FENCE.findall(text):
        if language not in ("", "bash", "sh", "shell", "console"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else part.split()
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


def tree_paths(text: str) -> Iterator[str]:
    """Yield the paths of each block that draws a folder tree, with indents of 2 or 4 columns joined to full paths."""
    for _, body in FENCE.findall(text):
        lines = [match for line in body.splitlines() if (match := TREE_LINE.match(line.rstrip()))]
        if not lines or not lines[0]["name"].endswith("/") or len(lines) < 3:
            continue
        parents: list[tuple[int, str]] = []
        for match in lines:
            depth = len(match["indent"])
            while parents and parents[-1][0] >= depth:
                parents.pop()
            yield "".join(name for _, name in parents) + match["name"]
            if match["name"].endswith("/"):
                parents.append((depth, match["name"]))


def make_targets(repo: Path) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (repo / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def sub_commands(repo: Path) -> set[str]:
    """The sub-commands that the program itself lists."""
    command = [sys.executable, "-m", "llamafactory.cli", "help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=repo)
    return set(re.findall(r"^\s{2,}([a-z]+)\b", result.stdout, re.MULTILINE))


def test_make_targets_exist(readme: str, repo_dir: Path) -> None:
    named = {words[1] for words in commands(readme) if words[0] == "make" and len(words) > 1}
    assert named - make_targets(repo_dir) == set()


def test_sub_commands_exist(readme: str, repo_dir: Path) -> None:
    if not (repo_dir / "src/llamafactory/cli.py").is_file():
        pytest.skip("cli.py is not written yet")
    programs = ("llamafactory-cli", "lmf")
    named = {words[1] for words in commands(readme) if Path(words[0]).name in programs and len(words) > 1}
    assert {name for name in named if not name.startswith("-")} - sub_commands(repo_dir) == set()


def test_files_named_in_commands_exist(readme: str, repo_dir: Path) -> None:
    named = {word for words in commands(readme) for word in words if re.fullmatch(r"[\w./-]+\.(ya?ml|py)", word)}
    shipped = {word for word in named if word.split("/")[0] in ("examples", "scripts", "benchmarks", "data", "tests")}
    assert {word for word in shipped if not (repo_dir / word).is_file()} == set()


def test_the_tree_is_the_real_one(readme: str, repo_dir: Path) -> None:
    assert {path for path in tree_paths(readme) if not (repo_dir / path).exists()} == set()


def test_links_lead_somewhere(readme: str, repo_dir: Path) -> None:
    assert {link for link in LINK.findall(readme) if not (repo_dir / link).exists()} == set()


def test_no_placeholder_is_left(readme: str) -> None:
    assert re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", readme, re.MULTILINE) == []


def test_every_make_target_is_explained(repo_dir: Path) -> None:
    text = (repo_dir / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z][\w-]*):.*## .", text, re.MULTILINE))
    assert make_targets(repo_dir) - explained == set()


def test_the_readers_read() -> None:
    text = (
        "```bash\n$ make test && OMP=1 llamafactory-cli train \\\n  a.yaml x='1 2'  # why\n```\n"
        "```\nsrc/llamafactory/   the package\n  cli.py        commands\n"
        "  data/         rows\n    types.py\ndocs/\n```\n"
    )
    shell = [words for words in commands(text) if words[0] in ("make", "llamafactory-cli")]
    assert shell == [["make", "test"], ["llamafactory-cli", "train", "a.yaml", "x=1 2"]]
    assert list(tree_paths(text)) == [
        "src/llamafactory/",
        "src/llamafactory/cli.py",
        "src/llamafactory/data/",
        "src/llamafactory/data/types.py",
        "docs/",
    ]


def test_every_test_file_that_is_named_exists(repo_dir: Path) -> None:
    text = (repo_dir / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w./-]+)`", text)
    assert named
    assert [name for name in named if not (repo_dir / name).exists()] == []
