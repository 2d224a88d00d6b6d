"""Ctrl+C and SIGTERM at a real process: it saves, tells the truth in its last line, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest


def start(repo_dir: Path, words: list[str], program: Sequence[str] = ("-m", "llamafactory")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repo_dir,
        env=os.environ | {"PYTHONPATH": str(repo_dir / "src")},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())
        if text in line:
            return lines
    raise AssertionError("the process ended early:\n" + "\n".join(lines[-20:]))


@pytest.fixture
def words(tiny_model_dir: Path, tmp_path: Path) -> list[str]:
    rows = [{"instruction": f"Say {number}.", "output": f"number {number} " * 4} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    return [
        f"model_name_or_path={tiny_model_dir}", "dataset=rows", f"dataset_dir={tmp_path}", "template=chatml",
        "do_train=true", f"output_dir={tmp_path / 'out'}", "per_device_train_batch_size=2", "num_train_epochs=50",
        "logging_steps=1", "save_steps=100000",
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_continues(repo_dir, words, tmp_path, number, code):
    process = start(repo_dir, words)
    wait_for(process, "step 3/1000")
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    last = rest.rstrip().splitlines()[-1]
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert last == (
        f"stopped by {number.name} after step {step} of 1000, saved in {checkpoint}; the same command continues"
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "interrupted"
    process = start(repo_dir, [*words, "save_strategy=no"])
    lines = wait_for(process, f"step {step + 1}/1000")
    assert any(f"continuing checkpoint-{step}" in line for line in lines)
    process.kill()
    process.communicate()


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(repo_dir, words, tmp_path):
    process = start(repo_dir, words)
    wait_for(process, "output: ")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.long
def test_ctrl_c_under_torchrun_saves_and_tells_the_truth(repo_dir, words, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "llamafactory", "train", *words, "use_cpu=true"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repo_dir,
        env=os.environ | {"PYTHONPATH": str(repo_dir / "src"), "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"},
        start_new_session=True,
    )
    wait_for(process, "step 3/")
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    last = rest.rstrip().splitlines()[-1]
    assert process.returncode == 130, rest[-3000:]
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert last.startswith("stopped by SIGINT after step ")
    assert last.endswith(f"saved in {checkpoint}; the same command continues")


def test_a_signal_while_a_finished_run_shuts_down_leaves_its_exit_code(repo_dir, words, tmp_path):
    """The interpreter takes a second here to shut down; with trackers and GPUs it may take longer."""
    late = (
        "import atexit, sys, time; atexit.register(lambda: (print('shutting down', file=sys.stderr), time.sleep(1)))"
    )
    code = f"{late}; import runpy; runpy.run_module('llamafactory', run_name='__main__')"
    process = start(repo_dir, [*words, "max_steps=2"], program=["-c", code])
    lines = wait_for(process, "shutting down")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert lines[-2].startswith("done: 2 steps")
