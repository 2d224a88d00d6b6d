"""`dataset_info.json` -> DatasetSpec, and what can be said of dataset names before any row is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from llamafactory.data.formats import NUMBERS, Detected, detect_format, find_format
from llamafactory.data.registry_entry import NO_ACCESS, REMOTE, chosen_hub, require_reachable, spec_from_entry
from llamafactory.data.sources import READERS, list_files, read_source
from llamafactory.data.sources.hub import INFO_NAME, download_registry
from llamafactory.data.sources.row import RepeatedKeys, json_object
from llamafactory.data.types import DatasetSpec, SourceAccess
from llamafactory.extras.errors import DataError, Problem
from llamafactory.extras.log import note
from llamafactory.extras.suggest import did_you_mean


class DatasetNames(Protocol):
    """The options that say which data sets are used; `DataConfig` has them."""

    @property
    def dataset(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def eval_dataset(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def dataset_dir(self) -> str | dict[str, Any]: ...  # noqa: D102


def find_specs(
    names: Sequence[str], dataset_dir: str | Mapping[str, Any], access: SourceAccess = NO_ACCESS
) -> list[DatasetSpec]:
    """The data sets of these names; a name may also be the path of a data file or folder.

    Raises:
        DataError: an unknown name, or an entry that is wrong.
    """
    return [find_spec(name, dataset_dir, access) for name in names]


def find_spec(name: str, dataset_dir: str | Mapping[str, Any], access: SourceAccess = NO_ACCESS) -> DatasetSpec:
    """The data set of this name, see `find_specs`."""
    if dataset_dir == "ONLINE":
        columns = find_format("alpaca").DEFAULT_COLUMNS
        source = chosen_hub()
        require_reachable(source, name, "dataset_dir: ONLINE", access)
        return DatasetSpec(name=name, source=source, location=name, columns=columns, access=access)
    info = None
    is_listed = isinstance(dataset_dir, Mapping) or dataset_dir.startswith(REMOTE)
    if is_listed or (Path(cast(str, dataset_dir)) / INFO_NAME).is_file() or not Path(name).exists():
        info = read_info(dataset_dir, access)
        if name in info:
            return spec_from_entry(name, info[name], dataset_dir, access)
    if (path := _as_data_path(name)) is not None:
        return spec_from_file(path, access)
    known = list(info or ())
    hint = did_you_mean(name, known)
    raise DataError(
        f"unknown data set '{name}'",
        where="dataset",
        found=f"no entry of that name in {_registry_place(dataset_dir)}, and no such file",
        expected=f"one of: {_listing(known)}" if known else "a name or the path of a data file",
        fix=hint or "add it to dataset_info.json, or give the path of a file",
    )


def _registry_place(dataset_dir: str | Mapping[str, Any]) -> str:
    if isinstance(dataset_dir, Mapping):
        return "the given dict"
    return dataset_dir if dataset_dir.startswith(REMOTE) else str(Path(dataset_dir) / INFO_NAME)


def read_info(dataset_dir: str | Mapping[str, Any], access: SourceAccess = NO_ACCESS) -> Mapping[str, Any]:
    """The entries of `dataset_info.json` in that folder; a dict is its own content.

    `REMOTE:user/repo` takes the file from a data set repository on the Hugging Face hub.

    Raises:
        DataError: missing, not JSON, not an object.
    """
    if isinstance(dataset_dir, Mapping):
        return dataset_dir
    if dataset_dir.startswith(REMOTE):
        file = download_registry(dataset_dir.removeprefix(REMOTE).strip(), access)
    else:
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
        info = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique_keys(file))
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


def _unique_keys(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = json_object(pairs)
        if isinstance(values, RepeatedKeys):
            found = f"'{values.key}' more than once in one object"
            raise DataError("a repeated key", where=str(file), found=found, expected="each key once")
        return values

    return build


def spec_from_file(path: Path, access: SourceAccess = NO_ACCESS) -> DatasetSpec:
    """A data file or folder without an entry: the format is what its first readable rows look like, said in a note.

    Raises:
        DataError: no format recognises the rows.
    """
    folder = access.media_dir or str(path if path.is_dir() else path.parent)
    bare = DatasetSpec(name=path.stem, source="file", location=str(path), media_dir=folder, access=access)
    rows = [row.values for row in islice(read_source(bare), 20) if row.fault is None]
    numbers = {key: None for key in NUMBERS if any(key in row for row in rows)}  # the first row may lack its own
    for row in rows:
        if (found := detect_format({**numbers, **row})) is not None:
            formatting, detected = found
            columns = ", ".join(f"{key}: {value}" for key, value in detected.columns.items())
            note(f"{path}: rows look like '{formatting}'{_kind(detected)} ({columns})", once=True)
            return replace(
                bare,
                formatting=formatting,
                columns=detected.columns,
                tags=detected.tags,
                is_ranking=detected.is_ranking,
            )
    keys = ", ".join(list(rows[0])[:8]) if rows else "no readable row"
    raise DataError(
        "no known format fits the rows",
        where=str(path),
        found=f"the columns {keys}" if rows else keys,
        expected="instruction and output (alpaca), conversations (sharegpt), messages (openai), or text",
        fix=f"describe the columns in an entry of {INFO_NAME}",
    )


def _kind(detected: Detected) -> str:
    if detected.is_ranking:
        return " preference pairs" + (" with margins" if "margin" in detected.columns else "")
    if "score" in detected.columns:
        return " with scored answers"
    if "kto_tag" in detected.columns:
        return " with judged answers"
    return " plain text" if detected.columns == {"prompt": "text"} else ""


def check_datasets(data: DatasetNames, access: SourceAccess = NO_ACCESS) -> list[Problem]:
    """What is wrong with the names in a config: all of it, without reading rows.

    Files without an entry are read as far as their first rows, to see whether a format fits.
    """
    problems: list[Problem] = []
    reported: set[str] = set()
    owners: dict[tuple[str, str], str] = {}
    for key, names in (("dataset", data.dataset), ("eval_dataset", data.eval_dataset)):
        for name in names:
            try:
                spec = find_spec(name, data.dataset_dir, access)
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


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
