"""`MANIFEST.json`: written last, it says what a whole checkpoint holds; without a match a folder is no checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, cast

from llamafactory.extras import failpoints
from llamafactory.extras.files import fsync, sha256_of

MANIFEST = "MANIFEST.json"
FORMAT = 2
"""1: random state of the first process only. 2: of every process, and a cursor of the data."""

_READ = re.compile(r"(adapter_)?config\.json|.*\.safetensors(\.index\.json)?")
_READERS = 4
"""Files that are hashed at a time."""


def seal(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Makes every file of a folder durable and writes the manifest last.

    Args:
        folder: holds all files of a checkpoint.
        facts: what the manifest says besides, for example run id and step.

    Returns:
        The manifest.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        failpoints.visit("save.file")
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format": FORMAT, **facts, "files": files}
    failpoints.visit("save.manifest")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    fsync(folder / MANIFEST)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync(inner)
    fsync(folder)
    return manifest


def find_fault(folder: Path, *, hashes: bool = True) -> str | None:
    """Compares a checkpoint with its manifest.

    Args:
        folder: of the checkpoint.
        hashes: read every file; False compares sizes only.

    Returns:
        None if all is well, else what is wrong and with which file.
    """
    try:
        manifest = _read(folder)
        if isinstance(found := manifest.get("format"), int) and found > FORMAT:
            return f"{MANIFEST} has format {found}, and this version reads up to {FORMAT}"
        files = _files_of(manifest)
    except FileNotFoundError:
        return f"{MANIFEST} is missing (the save did not finish, or another program wrote the folder)"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror or error}"
    except (ValueError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is damaged: {error}"
    for name, expected in files.items():
        if (fault := _fault_of_file(folder / name, expected, hashes=False)) is not None:
            return f"{name} {fault}"
    if (stranger := _stranger(folder, files)) is not None:
        return f"{stranger} is not of this checkpoint ({MANIFEST} does not name it), and would be read: take it out"
    if not hashes:
        return None
    with ThreadPoolExecutor(_READERS) as readers:  # hashing leaves the interpreter to the other threads
        faults = readers.map(lambda item: _fault_of_file(folder / item[0], item[1], hashes=True), files.items())
        return next((f"{name} {fault}" for name, fault in zip(files, faults, strict=True) if fault is not None), None)


def _stranger(folder: Path, files: Mapping[str, Any]) -> str | None:
    """A file that was put into a checkpoint, and that a loader of models, adapters or shards may read."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return next((name for name in names if name not in files and _READ.fullmatch(name)), None)


def _files_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file.

    Raises:
        TypeError: it is not what `seal` writes.
    """
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise TypeError("it has no list of files")
    for name, entry in cast("dict[str, Any]", files).items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or not name.isprintable():
            raise TypeError(f"{name!r} is no name of a file in this folder")
        size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str):
            raise TypeError(f"what it says of {name} has no size and sha256")
    return cast("dict[str, dict[str, Any]]", files)


def _fault_of_file(path: Path, expected: Mapping[str, Any], *, hashes: bool) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != expected["size"]:
            return f"has {path.stat().st_size} bytes instead of {expected['size']}"
        if hashes and sha256_of(path) != expected["sha256"]:
            return "is damaged (its sha256 differs)"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def read_facts(folder: Path) -> dict[str, Any]:
    """The manifest, or an empty mapping where there is none that can be read."""
    try:
        return _read(folder)
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def size_of(folder: Path) -> int:
    """Bytes of all files of a checkpoint, as its manifest has them; 0 where that is missing or damaged."""
    try:
        return sum(int(entry["size"]) for entry in _files_of(_read(folder)).values())
    except (OSError, ValueError, TypeError, RecursionError):
        return 0


def _read(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise TypeError("not a JSON object")
    return document
