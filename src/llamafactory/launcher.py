"""Runs training in this process, or in one process for each device through torchrun. Never through a shell.

`python -m llamafactory.launcher WORDS` is what torchrun starts: the words of the command line reach it unchanged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llamafactory.extras.supervision import VARIABLE as ENDINGS
from llamafactory.extras.supervision import Told, endings_file, read_told, still_running, stop_with_parent, tell

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_CHILD_MODULE = "llamafactory.launcher"
_ECHO_SECONDS = 2.0
_SHUTDOWN_SECONDS = 900
"""Once a save has begun, the disk decides; a process that does not get so far ends itself after `save_grace`."""
_STOPPED = (130, 143)
_OWN_FAULTS = (2, 3, 74)
"""Exit codes of a process that found out by itself what is wrong; others may only suffer from what befell another."""
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
    return _run_child(command, child_environment(os.environ), num_processes)


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
    signals = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT"}  # a closed terminal: go on
    return {**signals, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS), **added, **environ}


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


def _run_child(command: Sequence[str], environment: Mapping[str, str], num_processes: int = 1) -> int:
    """Starts torchrun in a group of its own, passes signals on, waits, and ends with the run's own code and last line.

    A terminal's Ctrl+C, and programs like timeout(1), signal a whole group at once: torchrun would get every signal
    twice, and leave its processes alone in the middle of their save.
    """
    with endings_file() as endings:
        signals = _Signals()
        with signals:
            own_group = 0 if os.name == "posix" else None
            child = subprocess.Popen(command, env={**environment, ENDINGS: str(endings)}, process_group=own_group)
            signals.pass_on_to(child)
            code = child.wait()
            _wait_for_orphans(endings, signals)
        told = read_told(endings)
    code = code if code >= 0 else 128 - code
    if not code:
        return 0
    code, line = _verdict(code, told, num_processes, signals.received)
    if line:
        print(line, file=sys.stderr)
    return code


class _Signals:
    """What asks this process to stop while its child runs.

    The first one is passed on, and a second one, which stops at once; what comes right behind the first is its echo.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._since = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        names = ("SIGTERM", "SIGINT", "SIGUSR1")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def pass_on_to(self, child: subprocess.Popen[bytes]) -> None:
        """Passes on what came so far, and what comes from now on."""
        self._child = child
        for number in self.received:
            self._send(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and (now - self._since < _ECHO_SECONDS or len(self.received) > 1):
            return
        self.received.append(number)
        self._since = now
        self._send(number)

    def _send(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _wait_for_orphans(endings: Path, signals: _Signals) -> None:
    """Where torchrun itself was killed, its processes save and stop; a new run could not begin before."""
    until, num_signals = time.monotonic() + _SHUTDOWN_SECONDS, len(signals.received)
    while still_running(read_told(endings)) and time.monotonic() < until and len(signals.received) == num_signals:
        time.sleep(0.2)


def _verdict(code: int, told: Sequence[Told], num_processes: int, received: Sequence[int]) -> tuple[int, str]:
    """Exit code and last line of a run whose processes did not all end well.

    Args:
        code: of torchrun, which is 1 whatever happened below it.
        told: by the processes, the first one first.
        num_processes: how many there were on this machine.
        received: signals that this process got.
    """
    stopped_as = _STOPPED[0 if received[0] == signal.SIGINT else 1] if received else None
    ended = [(one.code, one) for one in told if one.code is not None]
    failed = [(number, one) for number, one in ended if number not in (0, *_STOPPED)]
    silent = [one for one in told if one.code is None and all(one.pid != other.pid for _, other in ended)]
    if silent and not received and not any(number in _OWN_FAULTS for number, _ in failed):
        who = ", ".join(f"rank {one.rank} (pid {one.pid})" for one in silent)
        others = "".join(f"\nrank {one.rank}: {one.line}" for _, one in failed[:1])
        return code, f"error: {who} ended without a word: kill -9, no memory left, or a crash in a library{others}"
    if not failed and (received or len(ended) == num_processes):
        failed = [(stopped_as or number, one) for number, one in ended if number]
    if failed:
        alike = [one for number, one in failed if number == failed[0][0]]
        return failed[0][0], min(alike, key=lambda one: one.rank).line  # the first process knows most
    if stopped_as:  # no process came so far that it could say something
        return stopped_as, f"stopped by {signal.Signals(received[0]).name} before the first step"
    return code, f"error: torchrun ended with {code}"


def main(argv: Sequence[str] | None = None) -> int:
    """What each process of torchrun runs."""
    from llamafactory.extras.errors import LlamaFactoryError
    from llamafactory.python_api import load_config, run_exp
    from llamafactory.train.signals import StopRequest, StopSignal

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with StopRequest() as stop:
            stop_with_parent(lambda: bool(stop.signal))
            result = run_exp(load_config(words))
        code, line = result.exit_code, result.summary
    except StopSignal as stopped:
        code, line = stopped.exit_code, f"{stopped} before the first step"
    except LlamaFactoryError as error:
        code, line = error.exit_code, f"error: {error}"
        print(line, file=sys.stderr)
    except BaseException as error:
        tell(1, f"error: {type(error).__name__}: {error}")
        raise
    tell(code, line)
    return code


if __name__ == "__main__":
    _code = main()
    from llamafactory.train.signals import ignore_signals

    ignore_signals()
    sys.exit(_code)
