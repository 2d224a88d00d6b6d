"""A process that has imported everything and forks once for each run: a real process to kill, without its start-up.

Reads one JSON request a line from standard input, writes one JSON answer a line to standard output:
`{"start": {"words": [...], "env": {...}, "log": PATH, "trace": PATH | null, "world": {...}}}` -> `{"pid": N}`,
`{"wait": PID, "seconds": S}` -> `{"code": N}`, negative for a signal, or `{"code": null}` while it still runs.
`{"warm": WORDS}` runs once in this process, because libraries import much only when they are used.

Two things differ from `llamafactory-cli` in a shell: the modules are imported already, and the FLOP/s of the machine,
which only the logged MFU depends on, is not measured. What a run does with its files, signals and numbers is the same.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import socket
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


def start(words: list[str], env: dict[str, str], log: str, trace: str | None, world: dict[str, Any]) -> int:
    """Forks a run of its own session; its output goes into the file `log`; `world` is what `change_world` takes."""
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
        change_world(**world)
        import torch

        torch.set_num_threads(1)  # makes torch's pool, which does not survive a fork, before threads race to do so
        from llamafactory.cli import main as run
        from llamafactory.train import build

        build._peak_flops = lambda plan: 1e9
        code = run(words)
        for more in world.get("then", []):
            print(f"then {more[0]}: {run(more)}", flush=True)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def change_world(
    *,
    fsize: int | None = None,
    tmpfs: tuple[str, str] | tuple[str, str, bool] | None = None,
    readonly_when: tuple[str, str] | None = None,
    closed_stderr: bool = False,
    clock: tuple[float, int] | None = None,
    then: list[list[str]] | None = None,
) -> None:
    """Makes this process live in a worse world.

    Args:
        fsize: largest file that it may write, in bytes.
        tmpfs: a folder that becomes a disk of its own, its size, whether it is read-only; only this process sees it.
        readonly_when: a folder that can no longer be written once another path is there, as a disk with errors.
        closed_stderr: nobody reads what it says.
        clock: seconds by which the time of day jumps, and the step at whose beginning it does; 0: from the start.
        then: commands that run afterwards in the same process.
    """
    if fsize:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    if tmpfs:
        mount_tmpfs(*tmpfs)
    if readonly_when:
        own_mounts()
        threading.Thread(target=make_readonly, args=readonly_when, daemon=True).start()
    if closed_stderr:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
    if clock:
        jump_clock(*clock)


def jump_clock(seconds: float, step: int) -> None:
    """Sets the time of day, as a program sees it; the clock that only runs on stays as it is."""
    from llamafactory.train import loop

    now, original = time.time, loop._Run.train_step
    jumps = [seconds] if step == 0 else []
    time.time = lambda: now() + sum(jumps)
    time.time_ns = lambda: int((now() + sum(jumps)) * 1e9)

    def jumping(run: Any) -> None:
        if run.step + 1 == step and not jumps:
            jumps.append(seconds)
            print(f"the clock jumps by {seconds} s", flush=True)
        original(run)

    loop._Run.train_step = jumping


def note_socket(descriptor: int, event: str, arguments: tuple[Any, ...]) -> None:
    """Writes down any use of a socket that is not of this machine's own kind (AF_UNIX)."""
    is_network = event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if is_network or (event == "socket.__new__" and arguments[1] != socket.AF_UNIX):
        os.write(descriptor, f"{event} {arguments!r}\n".encode())


def own_mounts() -> None:
    """Gives this process mounts of its own. Raises: OSError where this system does not allow it."""
    new_namespace, recursive, private = 0x20000, 0x4000, 0x40000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_namespace):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    mount(b"none", b"/", None, recursive | private)


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    """Raises: OSError where this system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, kind, ctypes.c_ulong(flags), options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mount")


def mount_tmpfs(folder: str, size: str, is_readonly: bool = False) -> None:
    """Raises: OSError where this system does not allow it."""
    own_mounts()
    mount(b"tmpfs", os.fsencode(folder), b"tmpfs", int(is_readonly), f"size={size}".encode())


def make_readonly(folder: str, sign: str) -> None:
    """Waits for `sign`, and then lets no file in `folder` be opened for writing; files that are open stay so."""
    while not os.path.exists(sign):
        time.sleep(0.01)
    read_only, remount, bind = 0x1, 0x20, 0x1000
    path = os.fsencode(folder)
    mount(path, path, None, bind)
    mount(path, path, None, bind | remount | read_only)
    os.rename(sign, f"{sign} done")


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
