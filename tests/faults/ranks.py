"""Several processes that train together, forked from the zygote: what torchrun does, without its start-up."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tests.faults.harness import Outcome, Place, Run

PATIENCE = 240.0
GRACE = 3.0
"""Seconds between the end of one process and kill -9 of the others; torchrun gives more."""


@dataclass
class Ranks:
    """Processes of one run. Where one of them fails, the others are ended, as torchrun does."""

    runs: Sequence[Run]

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes, by rank."""
        until = time.monotonic() + seconds
        failed_at = math.inf
        while None in [run.poll() for run in self.runs]:
            if any(run.code for run in self.runs):
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() > failed_at + GRACE:
                self.kill()
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"the run hangs: nothing for {seconds} s\n{self.text[-4000:]}")
            time.sleep(0.01)
        return [run.code or 0 for run in self.runs]

    def kill(self) -> bool:
        """kill -9 of every process; whether it came before the run had ended by itself."""
        for run in self.runs:
            if run.poll() is None:
                os.kill(run.pid, signal.SIGKILL)
        for run in self.runs:
            run.poll(20)
        return any(run.code == -signal.SIGKILL for run in self.runs)

    @property
    def text(self) -> str:
        """What all of them said."""
        return "\n".join(f"rank {rank}:\n{run.text}" for rank, run in enumerate(self.runs))


def begin(
    place: Place,
    name: str,
    count: int,
    *more: str,
    fault: str = "",
    fault_rank: int | None = 0,
    own: Mapping[int, Sequence[str]] = MappingProxyType({}),
) -> Ranks:
    """Starts `count` processes on one output folder.

    Args:
        place: where.
        name: of the output folder.
        count: of processes.
        *more: options.
        fault: failpoint in the process `fault_rank`; in each, where that is None.
        own: options that only one process has, by rank.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ["train", *place.words, f"output_dir={place.folder / name}", *more]
    runs = []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = {key: str(value) for key, value in world.items()} if count > 1 else {}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"LLAMAFACTORY_FAILPOINT": fault} if fault and fault_rank in (rank, None) else {}
        logs = place.folder / f"{name}.{rank}.log"
        trace = place.folder / f"{name}.trace" if rank == 0 else None
        runs.append(place.zygote.start([*words, *own.get(rank, ())], logs, env=env, trace=trace))
    return Ranks(runs)


def finish(place: Place, name: str, count: int, *more: str) -> Outcome:
    """Runs to the end, which must be a good one."""
    ranks = begin(place, name, count, *more)
    codes = ranks.wait()
    assert not any(codes), f"{codes}: {ranks.text[-6000:]}"
    return place.outcome(name)


def stop_at(place: Place, name: str, count: int, step: int, *more: str) -> None:
    """Runs until the first process is killed at the beginning of step `step` (from 1)."""
    ranks = begin(place, name, count, *more, fault=f"step:{step}:kill")
    codes = ranks.wait()
    assert codes[0] == -signal.SIGKILL, f"{codes}: {ranks.text[-6000:]}"
