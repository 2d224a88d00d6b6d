"""When torchrun is used, with which words, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafactory import launcher
from llamafactory.extras.errors import ConfigError
from llamafactory.extras.supervision import Told
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig

CPU = RunConfig(train=TrainConfig(use_cpu=True))
WORDS = ["My Läufe/c 1.yaml", 'vllm_config={"a": "b c", "d": [1]}', "--run_name", "schön & gut; $HOME `x` *", "--bf16"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 0),
        ({"FORCE_TORCHRUN": "1"}, 1),
        ({"FORCE_TORCHRUN": "True"}, 1),
        ({"FORCE_TORCHRUN": "Y"}, 1),
        ({"FORCE_TORCHRUN": "0"}, 0),
        ({"FORCE_TORCHRUN": "on"}, 0),
        ({"NPROC_PER_NODE": "1"}, 0),
        ({"NPROC_PER_NODE": "2"}, 2),
        ({"NNODES": "2"}, 1),
        ({"NNODES": "1"}, 0),
        ({"NPROC_PER_NODE": "2", "LOCAL_RANK": "0"}, 0),
    ],
)
def test_when_torchrun_is_used(environ: dict[str, str], expected: int) -> None:
    assert launcher.count_processes(environ, CPU) == expected


def test_several_devices_give_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "count_devices", lambda *, use_cpu: 4)
    assert launcher.count_processes({}, RunConfig()) == 4
    assert launcher.count_processes({"NPROC_PER_NODE": "1"}, RunConfig()) == 0
    monkeypatch.setattr(launcher, "count_devices", lambda *, use_cpu: 1)
    assert launcher.count_processes({}, RunConfig()) == 0


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_counts_in_the_environment_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="NPROC_PER_NODE"):
        launcher.count_processes({"NPROC_PER_NODE": text}, CPU)


def test_words_of_one_machine() -> None:
    command = launcher.torchrun_command(WORDS, {"MASTER_PORT": "1234"}, 2)
    assert command[0] == sys.executable
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--nnodes", "1", "--node_rank", "0"),
        *("--master_addr", "127.0.0.1", "--master_port", "1234", "-m", "llamafactory.launcher", *WORDS),
    ]


def test_words_of_several_machines() -> None:
    environ = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    command = launcher.torchrun_command([], environ, 8)
    assert command[5:-2] == "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 5".split()


def test_words_of_an_elastic_run() -> None:
    environ = {"RDZV_ID": "job", "MIN_NNODES": "1", "MAX_NNODES": "3", "MAX_RESTARTS": "2", "MASTER_PORT": "5"}
    command = launcher.torchrun_command([], environ, 8)
    assert command[5:-2] == (
        "--nnodes 1:3 --rdzv-id job --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:5 --max-restarts 2".split()
    )


def test_a_free_port_is_found() -> None:
    command = launcher.torchrun_command([], {}, 1)
    assert 1024 <= int(command[command.index("--master_port") + 1]) < 65536


def test_memory_settings_of_the_child() -> None:
    assert launcher.child_environment({})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert launcher.child_environment({"PYTORCH_CUDA_ALLOC_CONF": "x"})["PYTORCH_CUDA_ALLOC_CONF"] == "x"
    assert launcher.child_environment({"OPTIM_TORCH": "0", "A": "b"}).items() >= {
        ("OPTIM_TORCH", "0"),
        ("A", "b"),
    }
    assert "PYTORCH_CUDA_ALLOC_CONF" not in launcher.child_environment({"OPTIM_TORCH": "0"})
    assert int(launcher.child_environment({})["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 600  # a save may take that long
    assert "SIGHUP" not in launcher.child_environment({})["TORCHELASTIC_SIGNALS_TO_HANDLE"]


@pytest.mark.parametrize("forced", ["0", "1"])
def test_launch_train_runs_here_or_in_a_child(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        exit_code = 130

    commands: list[list[str]] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FORCE_TORCHRUN", forced)
    monkeypatch.setattr("llamafactory.python_api.run_exp", lambda config: Result())
    monkeypatch.setattr(launcher, "_run_child", lambda command, environment, count: commands.append(command) or 7)
    assert launcher.launch_train(WORDS, CPU) == (7 if forced == "1" else 130)
    assert len(commands) == int(forced)


def run_child(code: str) -> int:
    return launcher._run_child([sys.executable, "-c", code], os.environ)


def test_exit_codes_of_the_child() -> None:
    assert run_child("raise SystemExit(0)") == 0
    assert run_child("raise SystemExit(3)") == 3


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_child_that_a_signal_ended() -> None:
    assert run_child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_reaches_the_child(tmp_path: Path) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, sys; from llamafactory.launcher import _run_child\n"
        f"sys.exit(_run_child([sys.executable, '-c', {child!r}], os.environ))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143  # as the processes below torchrun end


def told(rank: int, code: int | None, line: str = "") -> Told:
    return Told(pid=100 + rank, rank=rank, code=code, line=line)


BOTH = [told(0, None), told(1, None)]


@pytest.mark.parametrize(
    ("more", "received", "code", "line"),
    [
        ([told(1, 3, "no data"), told(0, 143, "stopped")], [], 3, "no data"),
        ([told(0, 74, "no room"), told(1, 1, "connection lost")], [], 74, "no room"),
        ([told(1, 1, "not finite"), told(0, 1, "not finite, saved in x")], [], 1, "not finite, saved in x"),
        ([told(1, 143, "nothing new"), told(0, 143, "saved in x")], [], 143, "saved in x"),
        ([told(1, 143, "nothing new"), told(0, 143, "saved in x")], [signal.SIGINT], 130, "saved in x"),
        ([told(0, 143, "saved")], [signal.SIGTERM], 143, "saved"),
        ([told(0, 143, "saved")], [], 1, r"error: rank 1 \(pid 101\) ended without a word"),
        (
            [told(0, 1, "connection lost")],
            [],
            1,
            r"rank 1 \(pid 101\) ended without a word.*\nrank 0: connection lost",
        ),
        ([], [signal.SIGINT, signal.SIGINT], 130, "stopped by SIGINT before the first step"),
    ],
)
def test_code_and_last_line_are_those_of_the_processes(
    more: list[Told], received: list[int], code: int, line: str
) -> None:
    found = launcher._verdict(1, [*BOTH, *more], 2, received)
    assert found[0] == code
    assert re.match(rf".*{line}", found[1], re.DOTALL)


def test_torchrun_that_starts_no_process_is_named() -> None:
    assert launcher._verdict(7, [], 2, []) == (7, "error: torchrun ended with 7")


def test_the_code_of_a_process_wins_over_that_of_torchrun(capfd: pytest.CaptureFixture[str]) -> None:
    tell = "from llamafactory.extras.supervision import tell; tell(None); tell(74, 'error: no room')"
    assert run_child(f"{tell}; raise SystemExit(1)") == 74
    assert capfd.readouterr().err.splitlines()[-1] == "error: no room"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_echoes_of_a_signal_are_not_passed_on(tmp_path: Path) -> None:
    """As from a terminal: the whole group gets it. The child, which is in a group of its own, gets each one once."""
    child = (
        "import pathlib, signal, sys, time\n"
        "got = []\n"
        "def note(number, frame):\n"
        "    got.append(number)\n"
        "    if len(got) == 2: print(*got, flush=True); sys.exit(1)\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, note)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "while True: time.sleep(0.05)\n"
    )
    parent = (
        "import os, sys; from llamafactory import launcher\n"
        "launcher._ECHO_SECONDS = 0.5\n"
        f"sys.exit(launcher._run_child([sys.executable, '-c', {child!r}], os.environ))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.02)
    for pause in (0.0, 0.1, 0.9):
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out.split() == [str(int(signal.SIGINT))] * 2
    assert process.returncode == 130, err


@pytest.mark.long
def test_words_survive_torchrun(tmp_path: Path) -> None:
    (tmp_path / "show_words.py").write_text(
        "import json, os, pathlib, sys\n"
        "path = pathlib.Path(__file__).with_name(f\"words-{os.environ['RANK']}.json\")\n"
        "path.write_text(json.dumps(sys.argv[1:]))\n"
        "raise SystemExit(0 if os.environ['WORLD_SIZE'] == '2' else 5)\n",
        encoding="utf-8",
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = launcher.torchrun_command(WORDS, {}, 2, child_module="show_words")
    assert launcher._run_child(command, environ) == 0
    for rank in range(2):
        assert json.loads((tmp_path / f"words-{rank}.json").read_text(encoding="utf-8")) == WORDS
