"""The table of `template: auto` on published templates is true, and its check can fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.types import Segment


@pytest.fixture(scope="module")
def script(repo_dir: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repo_dir / "scripts"))
    spec = importlib.util.spec_from_file_location("list_auto_templates", repo_dir / "scripts/list_auto_templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not module.published_files():
        pytest.skip("needs the chat templates in package trl")
    yield module
    sys.path.remove(str(repo_dir / "scripts"))


@pytest.mark.long
def test_the_page_of_published_templates_is_current(script: Any, embedded_model_dir: Path) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/list_auto_templates.py"


def test_nothing_on_the_page_is_wrong(script: Any) -> None:
    rows = [line for line in script.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows[2:]] == [file.stem for file in script.published_files()]
    assert not [row for row in rows if "WRONG" in row]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3", "gptoss", "nemotron_3_nano"])
def test_cells_of_the_page(script: Any, tokenizer: Any, name: str) -> None:
    [jinja] = [file.read_text(encoding="utf-8") for file in script.published_files() if file.stem == name]
    own = script.with_special_tokens(tokenizer, jinja)
    cells = [script.check_case(jinja, own, *case) for case in script.CASES.values()]
    assert f"| `{name}` | {' | '.join(cells)} |\n" in script.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("fault", "found"), [("mask", "WRONG: mask"), ("ids", "WRONG: ids")])
def test_a_wrong_mask_or_text_is_found(
    script: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fault: str, found: str
) -> None:
    def broken(*given: Any) -> Any:
        [(turn, *others)] = script.JinjaTemplate.render(given[1], given[0])
        if fault == "mask":
            segments = tuple(segment._replace(trainable=True) for segment in turn.prompt)
        else:
            segments = (*turn.prompt, Segment(text=" ", trainable=False))
        return [(turn._replace(prompt=segments), *others)]

    monkeypatch.setattr(script, "render_turns", broken)
    conversation, _ = script.CASES["three turns"]
    assert script.check_case(tokenizer.chat_template, tokenizer, conversation, None) == found
