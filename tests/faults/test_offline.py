"""`offline: true` makes no socket of a network, not even while libraries are imported: real commands, whole lives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults.conftest import write_place
from tests.faults.harness import ROOT

WATCHED = """
import os, sys
from tests.faults.zygote import note_socket
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(lambda event, arguments: note_socket(descriptor, event, arguments))
from llamafactory.cli import main
sys.exit(main(sys.argv[2:]))
"""
CALLS = "trace=socket,socketpair,connect,bind,listen,sendto,sendmsg,sendmmsg"


@pytest.fixture
def words(faults_model, tmp_path) -> list[str]:
    options = write_place(tmp_path, faults_model, 6, max_steps="2", offline="true")
    return ["train", *options, f"output_dir={tmp_path / 'out'}"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in an environment that says nothing of being offline."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_offline_makes_no_socket(words, tmp_path):
    audit = tmp_path / "sockets"
    done = run([sys.executable, "-c", WATCHED, str(audit), *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert audit.read_text() == ""


def test_the_watch_of_sockets_sees_them(tmp_path):
    watched = WATCHED.replace("main(sys.argv[2:])", "__import__('socket').socket().close()")
    assert run([sys.executable, "-c", watched, str(tmp_path / "sockets")]).returncode == 0
    assert "socket.__new__" in (tmp_path / "sockets").read_text()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_sees_no_connection_of_an_offline_run(words, faults_model, tmp_path):
    """What is not written in Python, and every process that is started, included; so is the export that follows."""
    used = traced(words, tmp_path / "calls")
    export = ["export", f"model_name_or_path={faults_model}", f"adapter_name_or_path={tmp_path / 'out'}"]
    export += ["template=chatml", f"export_dir={tmp_path / 'whole'}", "offline=true"]
    assert used + traced(export, tmp_path / "more calls") == []


def traced(words: list[str], calls: Path) -> list[str]:
    """Runs the real command; the system calls that have to do with a socket that is not of this machine's own kind."""
    command = ["strace", "-f", "-qq", "-e", CALLS, "-o", str(calls), sys.executable, "-m", "llamafactory", *words]
    done = run(command)
    if "Operation not permitted" in done.stderr and not calls.exists():
        pytest.skip("this system lets no test trace a process")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = calls.read_text().splitlines()
    return [line for line in lines if " socket(" in line and "AF_UNIX" not in line or "sa_family=AF_INET" in line]
