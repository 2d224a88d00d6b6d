from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(repo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repo_dir / "scripts")
    spec = importlib.util.spec_from_file_location("list_templates", repo_dir / "scripts" / "list_templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_templates_is_current(script: Any) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/list_templates.py"


def test_the_page_is_written_and_checked(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PAGE", tmp_path / "reference" / "templates.md")
    assert script.main(["--check"]) == 1
    assert "python scripts/list_templates.py" in capsys.readouterr().out
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    text = script.PAGE.read_text(encoding="utf-8")
    assert "| `qwen3` | `qwen3_nothink` | `qwen` | `<\\|im_end\\|>` | yes |\n" in text
