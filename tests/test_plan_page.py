"""The tables of docs/plan.md are what the commands print; those of a CPU differ with the machine, and are left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("plan_page", ROOT / "scripts" / "plan_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", ["llama_8b_lora", pytest.param("qwen3_moe_30b", marks=pytest.mark.long)])
def test_the_printed_tables_are_current(page, words):
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"{words}" in text
    assert page.rebuilt(text, only=words) == text


def test_the_table_of_measured_runs_is_that_of_the_results(page):
    assert page.accuracy_table() in page.PAGE.read_text(encoding="utf-8")


def test_a_page_keeps_what_is_outside_of_its_blocks(page, monkeypatch):
    monkeypatch.setattr(page, "printed_plan", lambda words: " ".join(words))
    text = "before\n<!-- plan a.yaml --json -->\nold\n<!-- end -->\nafter\n"
    made = "before\n<!-- plan a.yaml --json -->\n```text\na.yaml --json\n```\n<!-- end -->\nafter\n"
    assert page.rebuilt(text) == made == page.rebuilt(made)
    assert page.rebuilt(text, only="other") == text
