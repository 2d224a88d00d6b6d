"""Faults on demand: inert without the variable, exact with it, and never silently misspelt."""

from __future__ import annotations

from collections import Counter

import pytest

from llamafactory.extras import failpoints


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(failpoints, "_visits", Counter())


def test_nothing_happens_without_the_variable(monkeypatch):
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    assert not any(failpoints.visit(name) for name in failpoints.NAMES)


def test_the_nth_visit_of_the_named_place_goes_wrong(monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "step:3:nan, save.file:*:enospc,load:1:eio")
    assert [failpoints.visit("step") for _ in range(4)] == [False, False, True, False]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            failpoints.visit("save.file")
    with pytest.raises(OSError, match="Input/output error"):
        failpoints.visit("load")
    assert not failpoints.visit("eval")


@pytest.mark.parametrize("text", ["stp:1:kill", "step:0:kill", "step:x:kill", "step:1:explode", "step"])
def test_a_misspelt_failpoint_is_an_error(monkeypatch, text):
    monkeypatch.setenv(failpoints.VARIABLE, text)
    with pytest.raises(ValueError, match="want NAME:NTH:ACTION"):
        failpoints.visit("step")
