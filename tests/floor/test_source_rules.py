"""What the source never does, found in its syntax trees: load code from data, call a shell, swallow errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.popen": "goes through a shell",
    "os.system": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "subprocess.getstatusoutput": "goes through a shell",
    "torch.load": "reads pickles; use safetensors",
    "torch.save": "writes pickles; use safetensors",
    "yaml.load": "may build objects; use the safe loader",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
}
BANNED_FILE_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}


def violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what is wrong) for each broken rule."""
    origins = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules(node):
                if module.split(".")[0] in BANNED_IMPORTS:
                    yield node.lineno, f"imports {module}"
        elif isinstance(node, ast.Assert):
            yield node.lineno, "an assert is dropped by `python -O`; raise an error"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "a bare except catches Ctrl+C too"
        elif isinstance(node, ast.Call):
            yield from _bad_call(node, origins)


def _bad_call(node: ast.Call, origins: dict[str, str]) -> Iterator[tuple[int, str]]:
    name = _dotted(node.func, origins)
    if name in BANNED_CALLS:
        yield node.lineno, f"{name} {BANNED_CALLS[name]}"
    for keyword in node.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "shell" and not is_false:
            yield node.lineno, "goes through a shell"


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted origin, so that `from os import system as run` is seen."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return origins


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def _dotted(node: ast.expr, origins: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return origins.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, origins)}.{node.attr}"
    return "?"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_source_keeps_the_rules(path: Path) -> None:
    found = [f"{path.name}:{line}: {what}" for line, what in violations(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


def test_no_file_is_named_after_nothing() -> None:
    assert FILES
    parts = {str(path): {*path.relative_to(SOURCE).with_suffix("").parts} & BANNED_FILE_NAMES for path in FILES}
    assert {path: names for path, names in parts.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import yaml\nyaml.load(text, Loader=loader)",
        "eval('1')",
        "exec(code)",
        "from os import system as run\nrun('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "try:\n    x\nexcept:\n    pass",
        "assert x",
    ],
)
def test_the_rules_find_what_they_forbid(code: str) -> None:
    assert len(list(violations(ast.parse(code)))) == 1


@pytest.mark.parametrize("code", ["model.eval()", "run(x, shell=False)", "import yaml\nyaml.safe_load(text)"])
def test_the_rules_leave_the_rest_alone(code: str) -> None:
    assert list(violations(ast.parse(code))) == []
