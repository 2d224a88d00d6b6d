"""What a signal does before there is something to save, and afterwards. Real signals at this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llamafactory.train import signals
from llamafactory.train.signals import StopRequest, StopSignal, exit_code_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects what would have ended the process: exit code and last line, or the code where nothing is said."""
    found: list[Any] = []
    monkeypatch.setattr(signals, "_end", lambda *said: found.append(said[0] if len(said) == 1 else said))
    yield found
    assert StopRequest._active is None
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for timer in timers:
        timer.join(10)
    assert not any(timer.is_alive() for timer in timers), "it would end this process later"


def test_exit_codes() -> None:
    assert [exit_code_of(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, 143, 143]
    assert StopSignal(signal.SIGINT).exit_code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_something_to_save_a_signal_unwinds(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopSignal, match=number.name), StopRequest():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_afterwards_it_sets_a_flag_and_a_second_one_ends(ended: list[Any], monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with StopRequest() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(StopSignal):
            stop.check()
        with pytest.raises(StopSignal):
            stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [(130, "stopped at once by a second SIGINT: nothing was saved")]


def test_the_echo_of_torchrun_is_no_second_signal(ended: list[Any], monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with StopRequest() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        monkeypatch.setattr(signals, "_ECHO_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert [code for code, _ in ended] == [143]


def test_save_grace_ends_a_run_that_does_not_save(ended: list[Any], capfd) -> None:
    with StopRequest(grace=0.05) as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop._timer is not None
        stop._timer.join(60)
    assert ended == [(74, "error: no save within save_grace (0.05 s); the checkpoint before is whole")]
    assert "test_signals.py" in capfd.readouterr().err  # where it stood


def test_a_save_that_has_begun_is_not_hurried(ended: list[Any]) -> None:
    with StopRequest(grace=3600) as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        timer = stop._timer
        stop.in_time()
        assert timer is not None
        timer.join(60)
    assert not ended


def test_a_signal_in_the_last_save_is_not_hurried_either(ended: list[Any]) -> None:
    with StopRequest(grace=0.01) as stop:
        stop.defer()
        stop.in_time()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert stop._timer is None
    assert not ended


def test_after_the_last_line_one_signal_changes_nothing_and_two_end_with_its_code(ended: list[Any], capfd) -> None:
    with StopRequest() as stop:
        stop.defer()
        stop.over(7)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [7]
    assert not capfd.readouterr().err


def test_a_hangup_is_ignored() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.signal


def test_an_inner_request_is_the_outer_one() -> None:
    with StopRequest() as outer:
        with StopRequest(grace=7.0) as inner:
            assert inner is outer
            assert outer.grace == 7.0
        assert signal.getsignal(signal.SIGTERM) == outer._handle


def test_other_threads_install_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with StopRequest() as stop:
            stop.defer()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_end_is_the_end() -> None:
    code = "from llamafactory.train.signals import _end\n_end(74, 'the last line')\nprint('never')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (74, "", "the last line\n")
