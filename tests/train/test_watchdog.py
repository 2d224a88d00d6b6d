"""Signs of life between processes, over a store that is a mapping here."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from llamafactory.train import watchdog
from llamafactory.train.signals import StopRequest
from llamafactory.train.watchdog import SILENT_POLLS, Watchdog, watching, where


class Store(dict[str, str]):
    """As much of torch's store as the watchdog uses."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]


def make(store: Store, rank: int, ended: list[str] | None = None, stop: StopRequest | None = None) -> Watchdog:
    on_end = (ended if ended is not None else []).append
    return Watchdog(store, rank, 2, threading.main_thread().ident or 0, stop or StopRequest(), on_end)


def test_the_first_sign_of_life_comes_at_once() -> None:
    """A rank that stops in its first second would else never be missed."""
    store, over = Store(), threading.Event()
    over.set()
    make(store, 0).run(over)
    assert make(store, 1).silent_rank() is None
    assert len(store) == 1


def test_a_rank_that_counts_on_is_alive_and_one_that_does_not_is_named() -> None:
    store = Store()
    one, other = make(store, 0), make(store, 1)
    for _ in range(2 * SILENT_POLLS):
        other.say()
        assert one.silent_rank() is None
    found = [one.silent_rank() for _ in range(SILENT_POLLS)]
    assert found[:-1] == [None] * (SILENT_POLLS - 1)
    assert found[-1] is not None
    assert (found[-1]["rank"], found[-1]["pid"]) == (1, os.getpid())
    assert "watchdog.py:" in found[-1]["line"]  # the main thread speaks for itself here


def test_a_rank_that_is_done_or_has_not_begun_is_not_missed() -> None:
    store = Store()
    one, other = make(store, 0), make(store, 1)
    assert not any(one.silent_rank() for _ in range(2 * SILENT_POLLS))
    other.say(is_done=True)
    assert not any(one.silent_rank() for _ in range(2 * SILENT_POLLS))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_of_another_rank_reaches_this_one_once() -> None:
    store = Store()
    with StopRequest() as mine:
        mine.defer()
        one, told = make(store, 0, stop=mine), StopRequest()
        other = make(store, 1, stop=told)
        other.say()
        one.silent_rank()
        assert not mine.signal
        told.signal = signal.SIGTERM
        other.say()
        one.silent_rank()
        assert mine.signal == signal.SIGTERM
        one.silent_rank()  # a second one would end this process


def test_the_end_names_rank_line_and_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store, reasons, codes, killed = Store(), [], [], []
    one, other = make(store, 0, reasons), make(store, 1)
    other.say()
    one.doing = lambda: "step 3, rows: rows.json#7 (12 tokens)"
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog.os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    beat = {"rank": 1, **json.loads(store["llamafactory/heartbeat/1"])}
    one._end(beat)
    assert (codes, killed) == ([1], [os.getpid()])
    assert f"rank 1 (pid {os.getpid()} on " in reasons[0]
    assert reasons[0].endswith(", in step 3, rows: rows.json#7 (12 tokens)")
    assert reasons[0] in capsys.readouterr().err
    one.doing = lambda: {}["nothing"]
    one._end(beat)
    assert "rows cannot be named (KeyError)" in reasons[1]
    killed.clear()
    one._end({**beat, "pids": "pid:[another container]"})  # where its number is that of another process
    assert not killed


def test_alone_nobody_is_watched() -> None:
    with watching(SimpleNamespace(num_processes=1), StopRequest(), print) as dog:
        assert dog is None


def test_where_names_the_innermost_line_of_this_project() -> None:
    assert where(None) == "an unknown line"
    assert "test_watchdog.py" in where(sys._getframe())
