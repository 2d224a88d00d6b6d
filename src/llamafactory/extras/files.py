"""Files that are whole or not there: write beside, rename into place."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader never sees half a file, not even after a loss of power."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        content = json.dumps(document, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8 holds halves of characters
        content = json.dumps(document, indent=2).encode()
    try:
        staging.write_bytes(content + b"\n")
        fsync(staging)
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Makes a file's content, or a folder's list of names, survive a loss of power."""
    if sys.platform == "win32" and path.is_dir():  # Windows cannot flush a folder, and needs no such call
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_modes(folder: Path) -> None:
    """Gives weight files the mode that this user's new files have; safetensors makes them unreadable for others."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def user_cache_dir() -> Path:
    """This user's cache folder for this program (`XDG_CACHE_HOME` where it is set)."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "llamafactory"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "llamafactory" / "Cache"
    return Path.home() / ".cache" / "llamafactory"
