"""A folder of tokenised rows: sealed shards, and last of all a manifest that says that nothing is missing.

Whoever is killed leaves sealed shards behind; the next process goes on after them. Only one process writes at a time,
the others wait for it and then read. Where locks do not work (some network disks), two write the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from llamafactory.data.cache_key import key_of
from llamafactory.data.shard_file import DamagedShardError, read_shard, write_shard
from llamafactory.data.table import Shard
from llamafactory.extras import log
from llamafactory.extras.errors import DataError
from llamafactory.extras.files import user_cache_dir, write_json
from llamafactory.hparams.data import DataConfig

MANIFEST, LOCK = "manifest.json", ".lock"
_FORMAT = 1
_PATIENCE = 2.0
"""Seconds of waiting after which it is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCache:
    """One data set, tokenised.

    Attributes:
        folder: where it lies; made when something is written.
        parts: the key's parts, see `cache_key`.
        use: `train` or `eval`.
        name: of the data set, as the configuration calls it.
    """

    folder: Path
    parts: Mapping[str, str]
    use: str = ""
    name: str = ""

    def manifest(self) -> dict[str, Any] | None:
        """What the folder holds; None where it is not complete."""
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            return found if found["format"] == _FORMAT and isinstance(found["num_shards"], int) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self) -> list[tuple[Shard, dict[str, Any]]] | None:
        """All shards, mapped and checked; None where something is missing or damaged, which is said."""
        manifest = self.manifest()
        if manifest is None:
            return None
        with suppress(OSError):  # a folder that is only read says nothing of its use
            os.utime(self.folder / MANIFEST)
        try:
            return [self.read(number) for number in range(manifest["num_shards"])]
        except DamagedShardError as error:
            log.warn(f"tokenised rows in {self.folder} are damaged ({error}); this part is made again")
            return None

    def read(self, number: int) -> tuple[Shard, dict[str, Any]]:
        """One shard and its record; only the main process spends the time to compare checksums.

        Raises:
            DamagedShardError: not there, or not what was written.
        """
        shard, record = read_shard(self._path(number), is_checked=log.is_main_process())
        if record["key"] != dict(self.parts):
            raise DamagedShardError(f"shard {number} was made of something else")
        return shard, record

    def has(self, number: int) -> bool:
        """Whether a shard is sealed and whole."""
        try:
            self.read(number)
        except DamagedShardError:
            return False
        return True

    def seal(self, number: int, shard: Shard, record: Mapping[str, Any]) -> None:
        """Write a shard for good.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        with _explained(self.folder):
            write_shard(self._path(number), shard, {"key": dict(self.parts), **record})

    def finish(self, num_shards: int, files: Sequence[str]) -> None:
        """Say that the folder is complete. `files` are the names by which rows are called.

        Raises:
            DataError: as `seal`.
        """
        with _explained(self.folder):
            document = {
                "format": _FORMAT,
                "num_shards": num_shards,
                "use": self.use,
                "name": self.name,
                "files": list(files),
                "key": dict(self.parts),
            }
            write_json(self.folder / MANIFEST, document)

    def file_names(self) -> list[str]:
        """Names that the files of the data set had when the rows were tokenised."""
        return list((self.manifest() or {}).get("files", ()))

    def clear(self) -> None:
        """Forget what the folder holds, so that all of it is made again."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Waits until no other process writes here, and removes what a killed one left half written.

        Raises:
            DataError: the folder cannot be written.
        """
        with _explained(self.folder):
            lock = self._acquired()
            while not (self.folder / LOCK).exists():  # the folder was removed while this process waited
                lock.release()
                lock = self._acquired()
        try:
            for left in self.folder.glob(".*.safetensors.*"):
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _acquired(self) -> BaseFileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            log.info(f"waiting for another process that tokenises into {self.folder}")
            lock.acquire()
        return lock

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCaches:
    """Where the data sets of a run are kept.

    Attributes:
        root: the folder of all of them.
        is_named: the user named the folder (`tokenized_path`): a data set lies there under its name, and must be what
            it was; else it lies under its key, and another key is another folder.
        remakes: whether what is there is made again.
    """

    root: Path
    is_named: bool
    remakes: bool = False

    @classmethod
    def of(cls, data: DataConfig, cache_dir: Path | None) -> TokenCaches:
        """As a configuration says.

        Args:
            data: may name a folder.
            cache_dir: this program's cache folder; None: this user's.

        Raises:
            DataError: `tokenized_path` holds other files.
        """
        if data.tokenized_path is None:
            root = usual_root(cache_dir)
            return cls(root=root, is_named=False, remakes=data.overwrite_cache)
        root = Path(data.tokenized_path)
        others = root.is_dir() and not all(map(_is_just_made, root.iterdir()))
        if others and not any(root.glob(f"*/{LOCK}")):
            raise DataError(
                "tokenized_path holds other files than tokenised rows of this program",
                where=str(root),
                expected="an empty folder, or one that an earlier run filled",
                fix="name another folder; rows tokenised by other programs cannot be checked, and are not read",
            )
        return cls(root=root, is_named=True, remakes=data.overwrite_cache)

    def find(self, use: str, name: str, parts: Mapping[str, str]) -> TokenCache:
        """The place of a data set.

        Args:
            use: `train` or `eval`.
            name: of the data set.
            parts: its key, see `cache_key`.

        Raises:
            DataError: the named folder holds rows that were tokenised otherwise.
        """
        if not self.is_named:
            return TokenCache(folder=self.root / key_of(parts), parts=parts, use=use, name=name)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        if plain != name:  # two names of other letters shall not meet in one folder
            plain += f"-{sha256(name.encode()).hexdigest()[:8]}"
        folder = self.root / f"{use}-{plain}"
        cache = TokenCache(folder=folder, parts=parts, use=use, name=name)
        if not self.remakes and (manifest := cache.manifest()) is not None:
            _refuse_difference(folder, manifest["key"], parts)
        return cache

    def stored(self, parts: Mapping[str, str]) -> list[TokenCache]:
        """All data sets in the named folder, where a configuration names none; empty without such a folder.

        Args:
            parts: of the key, those that do not depend on rows.

        Raises:
            DataError: rows that were tokenised otherwise.
        """
        found: list[TokenCache] = []
        for path in sorted(self.root.glob(f"*/{MANIFEST}")) if self.is_named else ():
            cache = TokenCache(folder=path.parent, parts={})
            if (manifest := cache.manifest()) is not None:
                _refuse_difference(path.parent, {key: manifest["key"].get(key, "") for key in parts}, parts)
                found.append(replace(cache, parts=manifest["key"], use=manifest["use"], name=manifest["name"]))
        return found


def _is_just_made(folder: Path) -> bool:
    """Whether it is a data set's folder without its lock yet: another rank makes it now, or a run was killed there."""
    return folder.name.startswith(("train-", "eval-")) and folder.is_dir() and not any(folder.iterdir())


def usual_root(cache_dir: Path | None = None) -> Path:
    """Where tokenised rows are kept unless `tokenized_path` names a folder; `cache_dir` None: this user's."""
    own = os.environ.get("LLAMAFACTORY_TOKEN_CACHE")
    return Path(own) if own else (cache_dir or user_cache_dir()) / "tokens"


def _refuse_difference(folder: Path, there: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    differences = [
        f"{name}: {there.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} now"
        for name in {**there, **wanted}
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise DataError(
            "the rows in tokenized_path were tokenised otherwise",
            where=str(folder),
            found="\n              ".join(differences),
            expected="the same rows, tokenizer, template and options",
            fix="overwrite_cache: true makes them again; or name another folder, or leave tokenized_path out",
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the system says about a folder, as an error with a way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            "tokenised rows cannot be written",
            where=str(folder),
            found=error.strerror or str(error),
            expected="a folder with room",
            fix="free some room, or set cache_dir (or XDG_CACHE_HOME, or tokenized_path) to another folder",
        ) from error
