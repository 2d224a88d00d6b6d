"""A process that has imported everything and forks once for each run: a real process to kill, without its start-up.

Reads one JSON request a line from standard input, writes one JSON answer a line to standard output:
`{"start": {"words": [...], "env": {...}, "log": PATH, "trace": PATH | null}}` -> `{"pid": N}`, and
`{"wait": PID, "seconds": S}` -> `{"code": N}`, negative for a signal, or `{"code": null}` while it still runs.
`{"warm": WORDS}` runs once in this process, because libraries import much only when they are used.

Two things differ from `llamafactory-cli` in a shell: the modules are imported already, and the FLOP/s of the machine,
which only the logged MFU depends on, is not measured. What a run does with its files, signals and numbers is the same.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from typing import Any


def main() -> None:
    """Serves requests until standard input ends."""
    import_everything()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:
            answer: dict[str, Any] = {"code": warm(request["warm"])}
        elif "start" in request:
            answer = {"pid": start(**request["start"])}
        else:
            answer = {"code": wait(request["wait"], request["seconds"])}
        print(json.dumps(answer), flush=True)


def import_everything() -> None:
    """What a run imports; no thread may be running when it is done."""
    import accelerate  # noqa: F401
    import torch

    import llamafactory.train.build  # noqa: F401
    import llamafactory.train.tuner  # noqa: F401
    from llamafactory import cli, launcher, python_api  # noqa: F401
    from llamafactory.data import pipeline  # noqa: F401
    from llamafactory.model.adapters import full, lora  # noqa: F401

    torch.set_num_threads(1)


def warm(words: list[str]) -> int:
    """A run in this process; afterwards no thread may be left, and what is loaded is shared with all children."""
    from llamafactory.cli import main as run

    code = run(words)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    return code


def start(words: list[str], env: dict[str, str], log: str, trace: str | None) -> int:
    """Forks a run of its own session; its output goes into the file `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.environ.update(env)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if trace:
            trace_rows(trace)
        from llamafactory.cli import main as run
        from llamafactory.train import build

        build._peak_flops = lambda plan: 1e9
        code = run(words)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def trace_rows(path: str) -> None:
    """Writes the rows of every step that is begun into `path`, one JSON line each."""
    from llamafactory.train import loop

    original = loop._Run.train_step
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def traced(run: Any) -> None:
        line = json.dumps({"step": run.step + 1, "rows": run.job.feed.rows(run.step)}) + "\n"
        os.write(descriptor, line.encode())
        original(run)

    loop._Run.train_step = traced


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a run: negative for a signal, None where it still runs after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    main()
