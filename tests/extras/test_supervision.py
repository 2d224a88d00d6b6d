"""A process notices that nobody waits for it any more; what processes tell is read back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafactory.extras import supervision
from llamafactory.extras.supervision import endings_file, read_told, still_running, tell

CHILD = """
import pathlib, signal, sys, time
from llamafactory.extras import supervision
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
supervision.POLL_SECONDS = 0.05
supervision.stop_with_parent(lambda: bool(got))
pathlib.Path(sys.argv[1]).touch()
while not got: time.sleep(0.02)
pathlib.Path(sys.argv[1]).rename(sys.argv[1] + "-stopped")
"""
AGENT = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
pathlib.Path(sys.argv[2] + "-agent").touch()
child.wait()
"""
LAUNCHER = """
import os, subprocess, sys
from llamafactory.extras import supervision
with supervision.endings_file() as path:
    agent = subprocess.Popen(
        [sys.executable, "-c", *sys.argv[1:]], env={**os.environ, supervision.VARIABLE: str(path)},
        start_new_session=True,
    )
    print(agent.pid, flush=True)
    agent.wait()
    while supervision.still_running(supervision.read_told(path)): pass
"""


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="locks and signals of POSIX")
@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_a_process_stops_where_what_started_it_is_killed(victim: str, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, AGENT, CHILD, str(mark)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    wait_for(mark)
    os.kill(pid if victim == "agent" else launcher.pid, signal.SIGKILL)
    wait_for(tmp_path / "child-stopped")
    launcher.communicate(timeout=30)
    assert launcher.returncode == (0 if victim == "agent" else -signal.SIGKILL)


def test_what_is_told_is_read_back_and_torn_lines_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with endings_file() as path:
        monkeypatch.setenv(supervision.VARIABLE, str(path))
        monkeypatch.setenv("RANK", "3")
        tell(None)
        assert still_running(read_told(path)) == [os.getpid()]
        tell(74, "error: no room\nfor ü")
        with path.open("a", encoding="utf-8") as file:
            file.write('{"pid": 1, "rank"')
        told = read_told(path)
    assert [(one.rank, one.code, one.line) for one in told] == [(3, None, ""), (3, 74, "error: no room\nfor ü")]
    assert still_running(told) == []
    assert not path.exists()
    tell(1, "nobody hears it")


def test_without_a_launcher_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(supervision.VARIABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(supervision.threading, "Thread", None)  # would fail
    supervision.stop_with_parent(lambda: True)
