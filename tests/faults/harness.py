"""Runs that are killed and continued, and what must come out of them: the same rows, losses and weights."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
"""Seconds after which a run that should have ended counts as hanging."""


class Zygote:
    """Starts runs as real processes that need no imports; see `zygote.py`."""

    def __init__(self, **more: str) -> None:
        """Imports everything; `more` are variables of the environment."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
            "TOKENIZERS_PARALLELISM": "false", **more,
        }  # fmt: skip
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._read()

    def start(
        self,
        words: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        trace: Path | None = None,
        **world: Any,
    ) -> Run:
        """Starts `llamafactory-cli WORDS`; `world` is what `zygote.change_world` takes."""
        request = {
            "words": list(words),
            "env": dict(env or {}),
            "log": str(log),
            "trace": None if trace is None else str(trace),
            "world": world,
        }
        size = log.stat().st_size if log.exists() else 0
        return Run(zygote=self, pid=self.ask({"start": request})["pid"], log=log, log_start=size)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request and its answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the zygote."""
        self._child.communicate(timeout=20)

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the zygote died")
        return json.loads(line)


@dataclass
class Run:
    """A run that was started."""

    zygote: Zygote
    pid: int
    log: Path
    log_start: int
    code: int | None = None
    faults: tuple[str, ...] = ()

    def reach_fault(self) -> None:
        """Waits until the run is in its (first) fault, which therefore should be a sleep."""
        self.wait_for(f"failpoint {self.faults[0]}\n")

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            self.code = self.zygote.ask({"wait": self.pid, "seconds": seconds})["code"]
        return self.code

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; a run that takes longer is killed and is a failure."""
        code = self.poll(seconds)
        if code is None:
            self.kill()
            raise AssertionError(f"the run hangs: nothing for {seconds} s\n{self.text[-3000:]}")
        silent = [fault for fault in self.faults if f"failpoint {fault}\n" not in self.text]
        assert not silent, f"the run never came to {silent}\n{self.text[-3000:]}"
        return code

    def hear_signals(self) -> None:
        """Waits until the process catches SIGTERM: one that comes before ends it as any program that begins."""
        until = time.monotonic() + PATIENCE
        while self.poll() is None and time.monotonic() < until:
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
            if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                return
            time.sleep(0.002)

    def kill(self) -> bool:
        """kill -9; whether it came before the run had ended by itself."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.poll(20)
        return self.code == -signal.SIGKILL

    def send(self, number: int) -> None:
        """Sends a signal to the process."""
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Waits until the run has said `text`."""
        until = time.monotonic() + seconds
        while text not in self.text:
            if self.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the run never said {text!r}:\n{self.text[-3000:]}")
            time.sleep(0.005)

    @property
    def text(self) -> str:
        """What this process has said so far."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    @property
    def last_line(self) -> str:
        """The last line of what it said."""
        return self.text.rstrip().splitlines()[-1]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What must be the same with and without faults.

    Attributes:
        losses: step and loss as hex, evaluations too, from `trainer_log.jsonl`; as step 0 the mean of the whole run.
        weights: name and sha256 of the final safetensors files.
        rows: rows of each step that was begun last.
    """

    losses: list[tuple[int, str, str]]
    weights: dict[str, str]
    rows: dict[int, list[str]]


def outcome_of(folder: Path, trace: Path) -> Outcome:
    """Reads a finished run."""
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    losses = [
        (row["current_steps"], key, float(row[key]).hex())
        for row in log
        for key in row
        if key == "loss" or key.startswith("eval_")
    ]
    if "train_loss" in (results := json.loads((folder / "train_results.json").read_text())):
        losses.append((0, "train_loss", float(results["train_loss"]).hex()))
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    return Outcome(losses=losses, weights=weights, rows=rows_of(trace)[1])


def rows_of(trace: Path) -> tuple[list[tuple[int, list[str]]], dict[int, list[str]]]:
    """Every step that was begun with its rows, in order; and the same with the last beginning of each step."""
    entries = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
    begun = [(entry["step"], entry["rows"]) for entry in entries]
    return begun, dict(begun)


@dataclass
class Tally:
    """What the harness prints."""

    runs: int = 0
    kills: int = 0
    stops: int = 0
    bit_equal: int = 0
    rows_lost: int = 0
    cells: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, *, kills: int, lost: int, equal: bool) -> None:
        """Counts one run that was killed `kills` times and finished."""
        self.runs += 1
        self.kills += kills
        self.rows_lost += lost
        self.bit_equal += equal
        cell = self.cells.setdefault(name, {"runs": 0, "kills": 0, "bit_equal": 0, "rows_lost": 0})
        for key, value in {"runs": 1, "kills": kills, "bit_equal": int(equal), "rows_lost": lost}.items():
            cell[key] += value

    def add_stop(self) -> None:
        """Counts one run that a signal stopped, and that went on to the same end."""
        self.runs += 1
        self.stops += 1
        self.bit_equal += 1

    def write(self, path: Path, session: str) -> None:
        """Writes the counts as JSON; those of other test processes of the same session are added."""
        import fcntl

        document: dict[str, Any] = {
            "session": session,
            "runs": self.runs,
            "kills_survived": self.kills,
            "signals_obeyed": self.stops,
            "bit_equal": self.bit_equal,
            "rows_lost": self.rows_lost,
            "cells": dict(self.cells),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = json.loads(path.read_text()) if path.exists() else {}
            if found.get("session") == session:
                document |= {key: value + found[key] for key, value in document.items() if isinstance(value, int)}
                for name, counts in found["cells"].items():
                    ours = document["cells"].get(name, {})
                    document["cells"][name] = {key: number + ours.get(key, 0) for key, number in counts.items()}
            path.write_text(json.dumps(document, indent=1) + "\n")

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.kills} kills survived, {self.stops} signals obeyed, {self.rows_lost} rows lost, "
            f"{self.bit_equal} of {self.runs} runs bit-equal"
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with data and model, in which runs of one configuration are started."""

    zygote: Zygote
    folder: Path
    words: tuple[str, ...]

    def begin(
        self, name: str, *more: str, fault: str | None = None, env: Mapping[str, str] | None = None, **world: Any
    ) -> Run:
        """Starts a run whose output folder is `name`; `fault` is a failpoint, or several, all of which must come."""
        output = self.folder / name
        run = self.zygote.start(
            ["train", *self.words, f"output_dir={output}", *more],
            self.folder / f"{name}.log",
            env={**(env or {}), **({"LLAMAFACTORY_FAILPOINT": fault} if fault else {})},
            trace=self.folder / f"{name}.trace",
            **world,
        )
        run.faults = tuple(fault.split(",")) if fault else ()
        return run

    def finish(self, name: str, *more: str) -> Outcome:
        """Runs to the end, which must be a good one."""
        run = self.begin(name, *more)
        code = run.wait()
        assert code == 0, f"{code}: {run.text[-4000:]}"
        return self.outcome(name)

    def outcome(self, name: str) -> Outcome:
        """What a finished run left."""
        return outcome_of(self.folder / name, self.folder / f"{name}.trace")

    def is_finished(self, name: str) -> bool:
        """Whether the run says of itself that it is done, as it does in its very last write."""
        record = self.folder / name / "run.json"
        return record.exists() and json.loads(record.read_text())["state"] == "finished"

    def seconds_of(self, name: str, *more: str) -> tuple[Outcome, float]:
        """Like `finish`, with the time it took."""
        started = time.monotonic()
        outcome = self.finish(name, *more)
        return outcome, time.monotonic() - started


def compare(place: Place, name: str, reference: Outcome, tally: Tally, cell: str, kills: int) -> None:
    """Holds a finished run against the reference, and counts it."""
    found = place.outcome(name)
    begun, _ = rows_of(place.folder / f"{name}.trace")
    lost = sum(rows != reference.rows.get(step) for step, rows in begun) + len(set(reference.rows) - set(found.rows))
    equal = found.losses == reference.losses and found.weights == reference.weights
    tally.add(cell, kills=kills, lost=lost, equal=equal)
    assert lost == 0, f"{cell}: other rows than without kills"
    assert found.losses == reference.losses, cell
    assert found.weights == reference.weights, cell


def kill_at_random(place: Place, name: str, kills: int, span: float, rng: random.Random) -> int:
    """Starts the same command again and again, kills it at random moments, and lets it end at last.

    Args:
        place: where.
        name: of the output folder.
        kills: how often; fewer where the run is done earlier.
        span: seconds of a whole run; kills fall anywhere in it.
        rng: of the moments.

    Returns:
        Kills that came before the end.
    """
    survived = 0
    for _ in range(kills):
        run = place.begin(name)
        run.poll(rng.uniform(0.0, span))
        if not run.kill():
            assert run.code == 0, f"{run.code}: {run.text[-4000:]}"
            return survived
        survived += 1
        if place.is_finished(name):  # killed between its last word and its exit
            return survived
    run = place.begin(name)
    code = run.wait()
    assert code == 0, f"{code}: {run.text[-4000:]}"
    return survived


@contextmanager
def zygote(**environment: str) -> Iterator[Zygote]:
    """A zygote that ends with the block."""
    one = Zygote(**environment)
    try:
        yield one
    finally:
        one.close()
