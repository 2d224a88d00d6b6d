"""`runs`: what lies in output folders. Loads no torch, so that it answers at once and also while a run is going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem
from llamafactory.train.checkpoint.folders import clear_leftovers, discard, removable
from llamafactory.train.run_index import CheckpointInfo, RunInfo, find_runs, read_run
from llamafactory.train.run_lock import RunLock

HELP = """\
usage: llamafactory-cli runs list [FOLDER ...]        every run below the folders (default: saves)
       llamafactory-cli runs show FOLDER              one run: progress, checkpoints, the command that continues it
       llamafactory-cli runs verify FOLDER            reads every checkpoint and names each damaged file
       llamafactory-cli runs prune FOLDER --keep N    removes all but the newest N intact ones, and what crashes left

  --json       a document for programs; --dry-run: prune only says what it would remove
  exit codes   0 all is well, 1 verify found damage, 2 wrong words or no run there"""
_NO_RUN = "is no output folder of a run"


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The words behind the action."""

    folders: list[Path]
    as_json: bool
    is_dry: bool
    keep: int | None


def main(argv: list[str]) -> int:
    """Runs one action.

    Raises:
        ConfigError: the words make no sense, or there is no run.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("list", [])
    if action not in _ACTIONS:
        raise _wrong(f"unknown action '{action}'", "runs list, show, verify or prune")
    return _ACTIONS[action](_read_words(rest))


def _list(words: _Words) -> int:
    if absent := [root for root in words.folders if not root.is_dir()]:
        raise _wrong(f"no such folder: {absent[0]}", "folders with runs in them")
    folders = [run for root in words.folders or [Path("saves")] for run in find_runs(root)]
    runs = [run for folder in folders if (run := _try_read(folder)) is not None]
    if words.as_json:
        print(json.dumps([run.to_dict() for run in runs], indent=2))
        return 0
    if not runs:
        print("no runs")
    for run in runs:
        loss = "" if run.loss is None else f"loss {run.loss:.4f}"
        broken = sum(one.fault is not None for one in run.checkpoints)
        note = f", {broken} broken" if broken else ""
        print(
            f"{run.state:<12}{_progress(run):>14}  {loss:<12}  {len(run.checkpoints)} checkpoints{note}  {run.folder}"
        )
    return 0


def _show(words: _Words) -> int:
    run = _the_run(words, hashes=False)
    if words.as_json:
        print(json.dumps(run.to_dict(), indent=2))
        return 0
    print(f"{run.folder}\nstate        {run.state}\nprogress     {_progress(run)} steps")
    for name, value in (("loss", run.loss), ("time left", run.remaining), ("why", run.error), ("best", run.best)):
        if value is not None:
            print(f"{name:<13}{value}")
    for one in run.checkpoints:
        print(f"checkpoint   {_line(one)}")
    if run.resume:
        print(f"continue     {run.resume}")
    return 0


def _verify(words: _Words) -> int:
    folder = _folder(words)
    run = _the_run(words, hashes=True)
    found = run.checkpoints
    broken = [one for one in found if one.fault is not None]
    if words.as_json:
        print(json.dumps([vars(one) for one in found], indent=2))
    else:
        for one in found:
            print(f"{folder / one.name}: {one.fault or 'intact'}")
        print(f"{len(found)} checkpoints, {len(broken)} broken")
        if run.state == "damaged":
            print(f"{folder}: {run.error}")
    return 1 if broken or run.state == "damaged" else 0


def _prune(words: _Words) -> int:
    folder = _folder(words)
    if words.keep is None:
        raise _wrong("prune needs --keep N", "--keep 2")
    run = _the_run(words, hashes=False)
    if run.state == "damaged":
        raise LlamaFactoryError(f"{folder}: {run.error}: which checkpoints are of this run is not known")
    own = [one.name for one in run.checkpoints if one.is_own]
    kept = {run.best} if run.best else set[str]()
    if words.is_dry:
        removed = removable(folder, run.run_id, words.keep, kept, hashes=True)
    else:
        with RunLock(folder):  # never beside a run that is writing
            clear_leftovers(folder)
            removed = removable(folder, run.run_id, words.keep, kept, hashes=True)
            for path in removed:
                discard(path)
    if words.as_json:
        print(json.dumps({"removed": [path.name for path in removed], "dry_run": words.is_dry}))
    else:
        for path in removed:
            print(f"{'would remove' if words.is_dry else 'removed'} {path}")
        print(f"{len(removed)} of {len(own)} checkpoints {'would go' if words.is_dry else 'removed'}")
    return 0


def _progress(run: RunInfo) -> str:
    return f"{run.step}/{run.total_steps if run.total_steps is not None else '?'}"


def _line(one: CheckpointInfo) -> str:
    owner = "" if one.is_own or one.step is None else ", of another run"
    return f"{one.name}, {one.size / 1e6:,.1f} MB, {one.fault or 'whole'}{owner}"


def _try_read(folder: Path) -> RunInfo | None:
    try:
        return read_run(folder)
    except OSError:  # it was there a moment ago
        return None


def _the_run(words: _Words, *, hashes: bool) -> RunInfo:
    folder = _folder(words)
    try:
        return read_run(folder, hashes=hashes)
    except (FileNotFoundError, NotADirectoryError):
        raise _wrong(f"{folder} {_NO_RUN}", "a folder with a run.json") from None


def _folder(words: _Words) -> Path:
    if len(words.folders) != 1:
        raise _wrong("one folder is wanted", "the output_dir of a run")
    return words.folders[0]


def _read_words(argv: list[str]) -> _Words:
    words = list(argv)
    keep: int | None = None
    for place, word in enumerate(words):
        if word == "--keep" or word.startswith("--keep="):
            text = word.partition("=")[2] if "=" in word else "".join(words[place + 1 : place + 2])
            if not (text.isdigit() and int(text) > 0):
                raise _wrong(f"--keep {text}", "a whole number from 1 up")
            keep = int(text)
            del words[place : place + (1 if "=" in word else 2)]
            break
    flags = [word for word in words if word.startswith("-")]
    if unknown := [word for word in flags if word not in ("--json", "--dry-run")]:
        raise _wrong(f"unknown flag {unknown[0]}", "--json, --dry-run, --keep N")
    folders = [Path(word) for word in words if not word.startswith("-")]
    return _Words(folders=folders, as_json="--json" in flags, is_dry="--dry-run" in flags, keep=keep)


def _wrong(message: str, allowed: str) -> ConfigError:
    return ConfigError(
        Problem(origin="command line", message=message, allowed=allowed, fix="llamafactory-cli runs --help")
    )


_ACTIONS: Mapping[str, Callable[[_Words], int]] = {"list": _list, "show": _show, "verify": _verify, "prune": _prune}
