"""Runs training in this process, or in one process for each device through torchrun. Never through a shell.

`python -m llamafactory.launcher WORDS` is what torchrun starts: the words of the command line reach it unchanged.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_CHILD_MODULE = "llamafactory.launcher"
_TORCH_SETTINGS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}


def launch_train(argv: Sequence[str], config: RunConfig) -> int:
    """Train as configured.

    Args:
        argv: the words that `config` was made of; child processes read them again.
        config: the resolved configuration.

    Returns:
        The exit code of the run, or of torchrun.
    """
    num_processes = count_processes(os.environ, config)
    if num_processes == 0:
        from llamafactory.python_api import run_exp

        return run_exp(config).exit_code
    command = torchrun_command(argv, os.environ, num_processes)
    return _run_child(command, child_environment(os.environ), Path(config.train.output_dir or "."))


def count_processes(environ: Mapping[str, str], config: RunConfig) -> int:
    """Processes that torchrun shall start on this machine; 0 where this process trains by itself.

    A process that a launcher started trains by itself. torchrun is used with FORCE_TORCHRUN, with several machines,
    and where several processes are asked for or several devices are visible.
    """
    if "LOCAL_RANK" in environ:
        return 0
    asked = _read_count(environ, "NPROC_PER_NODE")
    is_forced = is_on(environ.get("FORCE_TORCHRUN")) or _read_count(environ, "NNODES", 1) > 1
    num_processes = asked or max(1, count_devices(use_cpu=config.train.use_cpu))
    return num_processes if is_forced or num_processes > 1 else 0


def count_devices(*, use_cpu: bool) -> int:
    """Accelerators that torch sees; 0 on a CPU."""
    if use_cpu:
        return 0
    import torch

    return torch.accelerator.device_count()


def torchrun_command(
    argv: Sequence[str], environ: Mapping[str, str], num_processes: int, *, child_module: str = _CHILD_MODULE
) -> list[str]:
    """The words that start torchrun; nothing in `argv` is quoted, split or changed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    nodes = environ.get("NNODES", "1")
    rendezvous_id = environ.get("RDZV_ID")
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    port = environ.get("MASTER_PORT") or str(find_free_port())
    if rendezvous_id:
        low, high = environ.get("MIN_NNODES"), environ.get("MAX_NNODES")
        command += ["--nnodes", f"{low}:{high}" if low and high else nodes]
        command += ["--rdzv-id", rendezvous_id, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"]
        command += ["--max-restarts", environ.get("MAX_RESTARTS", "0")]
    else:
        command += ["--nnodes", nodes, "--node_rank", environ.get("NODE_RANK", "0")]
        command += ["--master_addr", address, "--master_port", port]
    return [*command, "-m", child_module, *argv]


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of torchrun; OPTIM_TORCH, on by default, adds settings that save GPU memory."""
    added = _TORCH_SETTINGS if is_on(environ.get("OPTIM_TORCH", "1")) else {}
    return {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT", **added, **environ}  # a closed terminal: go on


def find_free_port() -> int:
    """A TCP port that is free now."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def is_on(value: str | None) -> bool:
    """Whether the value of an environment switch means on: true, y or 1, in any case."""
    return (value or "0").lower() in {"true", "y", "1"}


def _read_count(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    from llamafactory.extras.errors import ConfigError, Problem

    raise ConfigError(
        Problem(
            key=name,
            origin="environment",
            given=text,
            message="not a count",
            allowed="a whole number > 0",
            fix=f"unset {name}",
        )
    )


def _run_child(command: Sequence[str], environment: Mapping[str, str], output_dir: Path | None = None) -> int:
    """Start torchrun, pass SIGTERM on, wait. Ctrl+C reaches the child by itself; it needs time to save.

    torchrun ends with a trace and status 1 where a signal stops it; the run's own record tells what really happened.
    """
    before = _record_of(output_dir)
    child = subprocess.Popen(command, env=environment)
    received: list[int] = []

    def note_and_pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:
            child.send_signal(signal.SIGTERM)

    names = ("SIGTERM", "SIGINT", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.signal(number, note_and_pass_on) for number in numbers}
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code and output_dir:
        stopped_as = 130 if received and received[0] == signal.SIGINT else 143
        record = _record_of(output_dir)
        if record.get("state") == "interrupted" and record != before:
            print(record.get("summary"), file=sys.stderr)
            return int(record.get("exit_code", stopped_as))
        if received and record == before:  # the processes ended before there was a run to write about
            print(f"stopped by {signal.Signals(received[0]).name} before the first step", file=sys.stderr)
            return stopped_as
    return code if code >= 0 else 128 - code


def _record_of(output_dir: Path | None) -> dict[str, Any]:
    """`run.json` of an output folder; empty where there is none."""
    try:
        return {} if output_dir is None else json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    """What each process of torchrun runs."""
    from llamafactory.extras.errors import LlamaFactoryError
    from llamafactory.python_api import load_config, run_exp
    from llamafactory.train.signals import StopRequest, StopSignal

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with StopRequest():
            return run_exp(load_config(words)).exit_code
    except StopSignal as stopped:
        return stopped.exit_code
    except LlamaFactoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    _code = main()
    from llamafactory.train.signals import ignore_signals

    ignore_signals()
    sys.exit(_code)
