"""`dataset_info.json` -> DatasetSpec, and what can be said of dataset names before any row is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from llamafactory.data.formats import detect_format, find_format
from llamafactory.data.sources import READERS, list_files, read_source
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError, Problem
from llamafactory.extras.log import note
from llamafactory.extras.suggest import did_you_mean

INFO_NAME = "dataset_info.json"
_ANSWERS = ("chosen", "rejected", "kto_tag")
_COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "images",
    "videos",
    "audios",
    *_ANSWERS,
)
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
_KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_KINDS: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys((*_PLACES, "formatting", "subset", "split", "folder"), (str, "a text")),
    "ranking": (bool, "true or false"),
    "num_samples": (int, "a whole number"),
    "columns": (dict, 'an object such as {"prompt": "question"}'),
    "tags": (dict, 'an object such as {"role_tag": "role"}'),
}
_MISSING_PLACES = {
    "ms_hub_url": "ModelScope",
    "om_hub_url": "OpenMind",
    "script_url": "loading scripts (they run foreign code)",
    "cloud_file_name": "cloud files",
}


class DatasetNames(Protocol):
    """The options that say which data sets are used; `DataConfig` has them."""

    @property
    def dataset(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def eval_dataset(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def dataset_dir(self) -> str | dict[str, Any]: ...  # noqa: D102


def find_specs(names: Sequence[str], dataset_dir: str | Mapping[str, Any]) -> list[DatasetSpec]:
    """The data sets of these names; a name may also be the path of a data file or folder.

    Raises:
        DataError: an unknown name, or an entry that is wrong.
    """
    return [find_spec(name, dataset_dir) for name in names]


def find_spec(name: str, dataset_dir: str | Mapping[str, Any]) -> DatasetSpec:
    """The data set of this name, see `find_specs`."""
    if dataset_dir == "ONLINE":
        return DatasetSpec(name=name, source="hub", location=name, columns=find_format("alpaca").DEFAULT_COLUMNS)
    info = None
    if isinstance(dataset_dir, Mapping) or (Path(dataset_dir) / INFO_NAME).is_file() or not Path(name).exists():
        info = read_info(dataset_dir)
        if name in info:
            return spec_from_entry(name, info[name], dataset_dir)
    if (path := _as_data_path(name)) is not None:
        return spec_from_file(path)
    known = list(info or ())
    hint = did_you_mean(name, known)
    place = "the given dict" if isinstance(dataset_dir, Mapping) else str(Path(dataset_dir) / INFO_NAME)
    raise DataError(
        f"unknown data set '{name}'",
        where="dataset",
        found=f"no entry of that name in {place}, and no such file",
        expected=f"one of: {_listing(known)}" if known else "a name or the path of a data file",
        fix=hint or "add it to dataset_info.json, or give the path of a file",
    )


def read_info(dataset_dir: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of `dataset_info.json` in that folder; a dict is its own content.

    Raises:
        DataError: missing, not JSON, not an object.
    """
    if isinstance(dataset_dir, Mapping):
        return dataset_dir
    if dataset_dir.startswith("REMOTE:"):
        raise DataError(
            "a remote dataset_info.json is not implemented in this version",
            where="dataset_dir",
            found=dataset_dir,
            fix="download the file into a folder and set dataset_dir to it, or use dataset_dir: ONLINE",
        )
    file = Path(dataset_dir) / INFO_NAME
    if not file.is_file():
        raise DataError(
            f"no {INFO_NAME}",
            where=str(Path(dataset_dir)),
            found="no such folder" if not Path(dataset_dir).is_dir() else "a folder without it",
            expected=f"a folder with {INFO_NAME}",
            fix="set dataset_dir, or give the path of a data file as the dataset",
        )
    try:
        info = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8", where=str(file), found=str(error.reason), expected="UTF-8") from error
    except json.JSONDecodeError as error:
        found = f"{error.msg} (line {error.lineno}, column {error.colno})"
        raise DataError("the file is not valid JSON", where=f"{file}:{error.lineno}", found=found) from error
    if not isinstance(info, dict):
        raise DataError(
            "not an object at the top level", where=str(file), expected='{"name": {"file_name": ...}, ...}'
        )
    return cast("dict[str, Any]", info)


def spec_from_entry(name: str, given: object, dataset_dir: str | Mapping[str, Any]) -> DatasetSpec:
    """One entry, checked, with defaults filled in. A `columns` or `tags` block replaces all defaults of its kind.

    Raises:
        DataError: an unknown key, a value of the wrong type, no place to load from, a source that is not implemented.
    """
    where = f"{INFO_NAME}: {name}"
    if not isinstance(given, Mapping):
        raise DataError("the entry is not an object", where=where, expected='{"file_name": ...}')
    entry = cast("Mapping[str, Any]", given)
    _check_keys(entry, _KEYS, where)
    for key, value in entry.items():
        kind, expected = _KINDS[key]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise DataError(f"'{key}' has the wrong type", where=where, found=type(value).__name__, expected=expected)
    formatting: str = entry.get("formatting") or "alpaca"
    row_format = find_format(formatting)
    source, location = _place(entry, where, dataset_dir)
    return DatasetSpec(
        name=name,
        source=source,
        location=location,
        formatting=formatting,
        is_ranking=bool(entry.get("ranking")),
        subset=entry.get("subset"),
        split=entry.get("split") or "train",
        folder=entry.get("folder"),
        num_samples=entry.get("num_samples"),
        columns=_block(entry, "columns", _COLUMNS, row_format.DEFAULT_COLUMNS, where),
        tags=_block(entry, "tags", _TAGS, row_format.DEFAULT_TAGS, where),
    )


def spec_from_file(path: Path) -> DatasetSpec:
    """A data file or folder without an entry: the format is what its first readable rows look like, said in a note.

    Raises:
        DataError: no format recognises the rows.
    """
    bare = DatasetSpec(name=str(path), source="file", location=str(path))
    first = None
    for row in islice(read_source(bare), 20):
        if row.fault is not None:
            continue
        first = first or row
        if (found := detect_format(row.values)) is not None:
            formatting, (columns, tags) = found
            note(
                f"{path}: rows look like '{formatting}' ({', '.join(f'{k}: {v}' for k, v in columns.items())})",
                once=True,
            )
            return DatasetSpec(
                name=path.stem, source="file", location=str(path), formatting=formatting, columns=columns, tags=tags
            )
    keys = ", ".join(list(first.values)[:8]) if first else "no readable row"
    raise DataError(
        "no known format fits the rows",
        where=str(path),
        found=f"the columns {keys}" if first else keys,
        expected="instruction and output (alpaca), conversations (sharegpt), or messages (openai)",
        fix=f"describe the columns in an entry of {INFO_NAME}",
    )


def check_datasets(data: DatasetNames) -> list[Problem]:
    """What is wrong with the names in a config: all of it, without reading rows.

    Files without an entry are read as far as their first rows, to see whether a format fits.
    """
    problems: list[Problem] = []
    reported: set[str] = set()
    owners: dict[tuple[str, str], str] = {}
    for key, names in (("dataset", data.dataset), ("eval_dataset", data.eval_dataset)):
        for name in names:
            try:
                spec = find_spec(name, data.dataset_dir)
                if spec.source == "file":
                    list_files(Path(spec.location))
                if owners.setdefault((key, spec.name), name) != name:
                    text = f"has the same name as {owners[key, spec.name]}: {spec.name}"
                    problems.append(Problem(key=key, given=name, message=text, fix="rename one of the two"))
            except DataError as error:
                if str(error) not in reported:
                    reported.add(str(error))
                    problems.append(_problem(key, name, error))
    return problems


def _problem(key: str, name: str, error: DataError) -> Problem:
    message = error.what if error.where in (None, "dataset") else f"{error.where}: {error.what}"
    if error.found and error.where != "dataset":
        message += f" ({error.found})"
    return Problem(key=key, given=name, message=message, allowed=error.expected, fix=error.fix)


def _as_data_path(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir():
        return path
    return path if path.is_file() and path.suffix.lower() in READERS else None


def _place(
    entry: Mapping[str, Any], where: str, dataset_dir: str | Mapping[str, Any]
) -> tuple[Literal["file", "hub"], str]:
    """Where the rows come from; of several places: the hub, then a script, then the cloud, then a file."""
    if entry.get("hf_hub_url"):
        return "hub", entry["hf_hub_url"]
    for key, what in _MISSING_PLACES.items():
        if entry.get(key):
            raise DataError(
                f"'{key}' is not implemented in this version: {what}",
                where=where,
                expected="file_name or hf_hub_url",
                fix="download the data and give its file_name",
            )
    if entry.get("file_name"):
        folder = Path() if isinstance(dataset_dir, Mapping) else Path(dataset_dir)
        return "file", str(folder / entry["file_name"])
    raise DataError("the entry names no place to load from", where=where, expected="file_name or hf_hub_url")


def _block(
    entry: Mapping[str, Any], key: str, allowed: Sequence[str], defaults: Mapping[str, str | None], where: str
) -> Mapping[str, str | None]:
    given = entry.get(key)
    if given is None:
        return defaults
    _check_keys(given, allowed, f"{where}: {key}")
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"'{name}' has the wrong type", where=f"{where}: {key}", found=type(value).__name__, expected="a text"
            )
    if key == "tags":  # the two keys of a message have no meaningful null
        return {"role_tag": defaults.get("role_tag"), "content_tag": defaults.get("content_tag"), **given}
    return dict(given)


def _check_keys(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise DataError(
                f"unknown key '{key}'",
                where=where,
                expected=", ".join(allowed),
                fix=did_you_mean(str(key), allowed) or None,
            )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
