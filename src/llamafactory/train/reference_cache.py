"""Reference log-probabilities that are computed once and kept in a file, found by content.

The name of a file is a digest of the reference's weights, of the token ids and labels of all rows (so of tokenizer,
template, truncation and partners too), and of how numbers are computed. A file is an array of 4-byte numbers, one a
supervised token; 0 means "not known yet", so whoever is killed leaves a file that the next run goes on with. A run
holds its files open, and a file that is made anew takes the place of the old one by a rename: a run that uses the old
one goes on with it.
What this file never does: decide what the reference is, or load anything that runs code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llamafactory.data.answer_batch import AnswerGroup, collate_answers
from llamafactory.data.types import IGNORE_INDEX
from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.files import user_cache_dir
from llamafactory.model.shards import is_sharded
from llamafactory.train.agreement import together
from llamafactory.train.answers import reference_logps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.train.feed import Feed
    from llamafactory.train.stage import Models

TRAINING = "training"
_FORMAT = 1
_SAMPLE = 8
"""Rows of a file found that are computed again and compared."""
_LIMITS = {"float32": 1e-4}
_ROUGH = 0.1
"""Nats that a token may differ by: in float32, and where less precision makes another batch another number."""
_CHUNK = 64
"""Rows that are sorted into forward passes together."""


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all files: `LLAMAFACTORY_REFERENCE_CACHE`, or within the cache folder."""
    own = os.environ.get("LLAMAFACTORY_REFERENCE_CACHE")
    return Path(own) if own else (Path(cache_dir) if cache_dir else user_cache_dir()) / "references"


def keep_reference(
    cfg: RunConfig, feeds: dict[str, Any], models: Models, module: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """The feeds of a run, with the reference's log-probabilities where those are computed once.

    That is where training sees its rows more than once, or where `cache_reference` says so. The module then lets go of
    the reference.

    Args:
        cfg: the resolved configuration.
        feeds: the training feed under `TRAINING`, and those of evaluations.
        models: of the stage.
        module: the prepared `StageModule`.
        accelerator: of the run.
    """
    wish, training = getattr(cfg.stage_options, "cache_reference", False), feeds[TRAINING]
    if models.reference is None or cfg.data.streaming or wish is False:
        return feeds
    if any(is_sharded(parameter) for parameter in module.parameters()):
        if wish:
            log.note(
                "cache_reference has no effect with fsdp or deepspeed: processes that share a model compute in step"
            )
        return feeds
    schedule = training.schedule
    steps = schedule.total_windows(max_steps=cfg.train.max_steps, num_epochs=cfg.train.num_train_epochs)
    if not wish and (steps <= schedule.windows_per_epoch or not cfg.train.do_train):
        return feeds
    root = cache_root(cfg.model.cache_dir)
    known = with_known_reference(feeds, models, accelerator, root=root, remakes=cfg.data.overwrite_cache)
    if known is None:
        return feeds
    accelerator.unwrap_model(module).forget_reference()
    return known


def with_known_reference(
    feeds: Mapping[str, Feed], models: Models, accelerator: Accelerator, *, root: Path, remakes: bool = False
) -> dict[str, Feed] | None:
    """Feeds whose rows bring the reference's log-probabilities along.

    Args:
        feeds: of pairs or judged answers; the key is for people.
        models: policy and reference, on their device, the policy as it was before training where it is the reference.
        accelerator: of the run; the processes of a machine share the work.
        root: folder of the files.
        remakes: whether what is there is computed again.

    Returns:
        The feeds, or None where a file cannot be written, which is said: then the reference runs in every step.

    Raises:
        LlamaFactoryError: numbers that were found differ from those that the reference gives now.
    """
    if models.reference is None:
        raise ValueError("there is no reference")
    identity = {
        "format": _FORMAT, "weights": models.reference.digest(models.policy), "dtype": models.plan.weight_dtype,
        "autocast": models.plan.autocast, "temperature": models.temperature,
    }  # fmt: skip
    found: dict[str, Feed] = {}
    try:
        for name, feed in feeds.items():
            filler = _Filler(feed, models, accelerator)
            known = _known(filler.digest, identity, filler.starts, root)
            if accelerator.is_local_main_process:
                together(accelerator, partial(known.create, remakes=remakes))
            else:
                together(accelerator, lambda: None)
            missing = together(accelerator, known.missing)  # before anyone writes
            together(accelerator, partial(filler.fill, known, missing, name))
            together(accelerator, known.require_complete)
            found[name] = replace(feed, read=_reader(feed, filler.places, known))
    except OSError as error:
        log.warn(f"reference log-probabilities cannot be kept in {root}: {error}; the reference runs in every step")
        return None
    return found


@dataclass(frozen=True, kw_only=True)
class Known:
    """A file of log-probabilities.

    Attributes:
        path: of the file.
        starts: int64 `[rows + 1]`, the first number of each row, and their count.
    """

    path: Path
    starts: NDArray[np.int64]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return 4 * int(self.starts[-1])

    def create(self, *, remakes: bool = False) -> None:
        """Makes the file, with room for all numbers; one of another size is not ours, and made anew.

        Args:
            remakes: make it anew in any case. Whoever has opened the file that was there keeps that one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_there = self.path.exists() and self.path.stat().st_size == self.num_bytes
        if not self.num_bytes or (is_there and not remakes):
            return
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with staging.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is found now
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)
                file.truncate(self.num_bytes)
            staging.replace(self.path)
        finally:
            staging.unlink(missing_ok=True)

    @cached_property
    def _file(self) -> FileIO:
        try:
            file = FileIO(self.path, "r+")
        except PermissionError:  # a cache that somebody else keeps
            file = FileIO(self.path, "r")
        weakref.finalize(self, file.close)
        return file

    def _words(self, start: int, stop: int) -> NDArray[np.uint32]:
        if start == stop:
            return np.zeros(0, dtype=np.uint32)
        with self._lock:
            self._file.seek(4 * start)
            return np.fromfile(self._file, dtype=np.uint32, count=stop - start)

    def missing(self) -> NDArray[np.int64]:
        """Rows of which a number is not known."""
        words = self._words(0, int(self.starts[-1]))
        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        return np.unique(rows[words[: len(rows)] == 0])

    def require_complete(self) -> None:
        """Stops where another process could not write its part.

        Raises:
            OSError: numbers are missing.
        """
        if len(self.missing()):
            raise OSError(f"{self.path} is not complete")

    def read(self, row: int) -> NDArray[np.float32]:
        """The numbers of a row."""
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        words = self._words(start, stop)
        if len(words) != stop - start or not words.all():
            raise LlamaFactoryError(f"{self.path} was changed while it was in use; remove it and start again")
        return np.invert(words).view(np.float32)

    def write(self, values: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
        """Writes rows."""
        for row, numbers in values:
            words = np.invert(numbers.astype(np.float32, copy=False).view(np.uint32)).tobytes()
            with self._lock:
                self._file.seek(4 * int(self.starts[row]))
                if words and self._file.write(words) != len(words):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _known(rows: str, identity: Mapping[str, Any], starts: NDArray[np.int64], root: Path) -> Known:
    key = hashlib.blake2b(json.dumps([identity, rows], sort_keys=True).encode(), digest_size=16).hexdigest()
    return Known(path=root / f"{key}.logps", starts=starts)


class _Filler:
    """The rows of a feed, and the reference that they are run through."""

    def __init__(self, feed: Feed, models: Models, accelerator: Accelerator) -> None:
        self.feed, self._models, self._accelerator = feed, models, accelerator
        self.items = feed.schedule.items
        self.places = {item[0]: place for place, item in enumerate(self.items)}
        digest, counts = hashlib.blake2b(digest_size=16), []
        for item in self.items:
            row = _row(self.feed, item)
            targets = [one.labels[1:] != IGNORE_INDEX for one in row.answers]
            counts.append(sum(int(np.count_nonzero(one)) for one in targets))
            for one in row.answers:
                digest.update(len(one).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(one.input_ids).tobytes())
                digest.update(np.ascontiguousarray(one.labels).tobytes())
        self.digest = digest.hexdigest()
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def fill(self, known: Known, missing: NDArray[np.int64], name: str) -> None:
        """Computes this process's share of the missing rows, and compares a few of those that were there."""
        there = np.setdiff1d(np.arange(len(self.items)), missing)
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = missing[self._accelerator.local_process_index :: num_local].tolist()
        log.info(
            f"reference: log-probabilities of {len(there):,} {name} rows are known, "
            f"{len(missing):,} are computed now, once; {known.path}"
        )
        if len(there):
            sample = there[np.unique(np.linspace(0, len(there) - 1, _SAMPLE).astype(np.int64))]
            self._compare(known, self.run(sample.tolist()))
        for start in range(0, len(share), _CHUNK):
            failpoints.visit("reference")
            known.write(self.run(share[start : start + _CHUNK]))

    def run(self, places: Sequence[int]) -> list[tuple[int, NDArray[np.float32]]]:
        """The reference's numbers of some rows."""
        found: list[tuple[int, NDArray[np.float32]]] = []
        plan, pad_id = self._models.plan, self.feed.pad_id
        for items in self.feed.schedule.micro_batches(list(places)):
            batch = collate_answers([_row(self.feed, item) for item in items], plan.layout, pad_id)
            with torch.no_grad(), self._accelerator.autocast():
                values = reference_logps(self._models, batch.to(self._accelerator.device))
            parts = values.float().cpu().numpy()
            own = [self.places[item[0]] for item in items]
            ends = np.cumsum([self.starts[place + 1] - self.starts[place] for place in own])[:-1]
            found += zip(own, np.split(parts, ends), strict=True)
        return found

    def _compare(self, known: Known, live: Sequence[tuple[int, NDArray[np.float32]]]) -> None:
        plan, reference = self._models.plan, self._models.reference
        limit = _LIMITS.get(plan.weight_dtype, _ROUGH) if plan.autocast == "no" else _ROUGH
        if reference is not None and reference.bits == 8:  # activations are rounded too, by what lies beside them
            limit = _ROUGH
        for row, numbers in live:
            gap = float(np.abs(known.read(row) - numbers).max(initial=0.0))
            if not gap <= limit:
                raise LlamaFactoryError(
                    f"the log-probabilities that were kept are not those of the reference: row {row} differs by "
                    f"{gap:.2g} nats, at most {limit:g} is allowed\n"
                    f"    file:    {known.path}\n"
                    "    fix:     remove the file, or set overwrite_cache: true once"
                )


def _row(feed: Feed, item: tuple[int, ...]) -> AnswerGroup:
    if feed.read is None:
        raise ValueError("rows without answers")
    (row,) = feed.read(item)
    return row


def _reader(feed: Feed, places: Mapping[int, int], known: Known) -> Callable[[tuple[int, ...]], Sequence[AnswerGroup]]:
    def read(item: tuple[int, ...]) -> list[AnswerGroup]:
        row = _row(feed, item)
        counts = [int(np.count_nonzero(one.labels[1:] != IGNORE_INDEX)) for one in row.answers]
        parts = np.split(known.read(places[item[0]]), np.cumsum(counts)[:-1])
        return [replace(row, reference=tuple(parts))]

    return read
