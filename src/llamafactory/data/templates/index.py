"""Which entry is in which file. Names come from table headers: to read one entry, only its files are parsed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources

LEFT_OUT = ("hy_dense_1_8b", "hy_dense_7b", "moss_vl")
"""Names of LLaMA Factory without an entry: what they write is not known for sure, and could not be proven."""
_HEADER = re.compile(r'^\[(?:"([^"\n]+)"|([A-Za-z0-9_-]+))\]$', re.MULTILINE)


def entry_names() -> tuple[str, ...]:
    """Names of all entries, sorted."""
    return tuple(sorted(_files_by_name()))


def read_entry(name: str) -> Mapping[str, object]:
    """The fields of an entry and of its ancestors, the nearer beating the farther; `extends` is that of the entry.

    Raises:
        KeyError: there is no such entry.
    """
    entry = _read_file(_files_by_name()[name])[name]
    parent = entry.get("extends")
    return entry if parent is None else {**read_entry(str(parent)), **entry}


@cache
def _files_by_name() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for file, text in _texts().items():
        for quoted, bare in _HEADER.findall(text):
            name = quoted or bare
            if name in found:
                raise ValueError(f"template '{name}' has two entries, in {found[name]} and {file}")
            found[name] = file
    return found


@cache
def _texts() -> Mapping[str, str]:
    folder = resources.files(__package__ or "")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name: file.read_text(encoding="utf-8") for file in files}


@cache
def _read_file(file: str) -> Mapping[str, Mapping[str, object]]:
    return tomllib.loads(_texts()[file])
