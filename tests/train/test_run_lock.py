"""One run at a time in a folder: this machine's file locks, and signs of life of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.train import run_lock
from llamafactory.train.run_lock import LOCK_FILE, RunLock, boot_id, is_held, read_holder


def test_a_lock_says_who_holds_it_and_goes_away(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        holder = read_holder(tmp_path / LOCK_FILE)
        assert holder["pid"] == os.getpid()
        assert holder["boot_id"] == boot_id()
        assert is_held(tmp_path)
        with pytest.raises(ConfigError, match=f"another run is using this folder: pid {os.getpid()} on "):
            RunLock(tmp_path).take()
    lock.release()  # again: nothing
    assert not (tmp_path / LOCK_FILE).exists()
    assert is_held(tmp_path) is False


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys, pathlib\nfrom llamafactory.train.run_lock import RunLock\n"
        "RunLock(pathlib.Path(sys.argv[1])).take()\nprint(os.getpid(), flush=True)\nos._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert read_holder(tmp_path / LOCK_FILE)["pid"] == int(done.stdout)
    assert is_held(tmp_path) is False
    with RunLock(tmp_path):
        assert f"is left over from pid {int(done.stdout)}" in capsys.readouterr().err


def remote_lock(folder: Path, age: float) -> Path:
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "boot_id": "other", "started": "today"}))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Naps:
    """Time that passes only while this module sleeps."""
    found = Naps()
    clock = SimpleNamespace(sleep=found.sleep, monotonic=lambda: found.passed, time=time.time)
    monkeypatch.setattr(run_lock, "time", clock)
    return found


@dataclass
class Naps:
    """What happens while somebody sleeps: `events` maps a moment, in seconds, to what is done then."""

    passed: float = 0.0
    events: dict[float, Callable[[], None]] = field(default_factory=dict)

    def sleep(self, seconds: float) -> None:
        self.passed += seconds
        for moment in [moment for moment in self.events if moment <= self.passed]:
            self.events.pop(moment)()


DAY = 86_400.0


@pytest.mark.parametrize(("age", "waited"), [(1000, 25), (30, 30), (50, 25), (DAY, 25), (-DAY, 60)])
def test_a_silent_lock_of_another_machine_is_watched_and_taken_over(
    tmp_path: Path, naps: Naps, age: float, waited: float
) -> None:
    remote_lock(tmp_path, age=age)
    assert is_held(tmp_path) is (True if abs(age) < 60 else None)  # only the other machine knows
    with RunLock(tmp_path):
        assert read_holder(tmp_path / LOCK_FILE)["pid"] == os.getpid()
    assert naps.passed == pytest.approx(waited, abs=1.0)


@pytest.mark.parametrize("jump", [0.0, DAY, -DAY])
def test_a_touched_lock_of_another_machine_is_respected_whatever_the_clock_says(
    tmp_path: Path, naps: Naps, jump: float
) -> None:
    """The clock jumps after the holder's last touch: the lock looks a day old, or of tomorrow."""
    path = remote_lock(tmp_path, age=9 + jump)
    touched = path.stat().st_mtime + jump + 10
    naps.events[1.0] = lambda: os.utime(path, (touched, touched))
    with pytest.raises(ConfigError, match="pid 7 on elsewhere, started today"):
        RunLock(tmp_path).take()
    assert naps.passed < 2.0
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_lock_holds_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    assert read_holder(tmp_path / LOCK_FILE) == {}
    assert is_held(tmp_path) is False
    with RunLock(tmp_path):
        assert is_held(tmp_path)


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunLock(tmp_path).take()
    original = run_lock._lock

    def just_released(descriptor: int, *, shared: bool = False) -> bool:
        first.release()  # between the opening of the file and its lock
        return original(descriptor, shared=shared)

    second = RunLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_lock", just_released)
        second.take()
    with pytest.raises(ConfigError, match="another run is using this folder"):
        RunLock(tmp_path).take()
    second.release()


def test_one_who_only_looks_keeps_no_run_out(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "here", "pid": 1, "boot_id": boot_id()}))
    descriptor = os.open(path, os.O_RDONLY)
    assert run_lock._lock(descriptor, shared=True)  # as `runs list` does for a moment
    timer = threading.Timer(0.1, os.close, (descriptor,))
    timer.start()
    with RunLock(tmp_path):
        timer.join()


def test_a_folder_in_place_of_the_lock_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(ConfigError, match=r"run\.lock cannot be opened: Is a directory"):
        RunLock(tmp_path).take()
