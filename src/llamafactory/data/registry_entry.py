"""One entry of `dataset_info.json` -> DatasetSpec: every key checked, defaults filled in, the source chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from llamafactory.data.formats import find_format
from llamafactory.data.sources.cloud import check_cloud_url
from llamafactory.data.sources.hub import INFO_NAME, check_hub
from llamafactory.data.sources.split import parse_split
from llamafactory.data.types import DatasetSpec, SourceAccess
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note
from llamafactory.extras.suggest import did_you_mean

REMOTE = "REMOTE:"
_ANSWERS = ("chosen", "rejected", "margin", "kto_tag", "score")
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
Source: TypeAlias = Literal["file", "cloud", "hub", "modelscope", "openmind"]
_HUB_KEYS: Mapping[Source, str] = {"modelscope": "ms_hub_url", "openmind": "om_hub_url", "hub": "hf_hub_url"}
_HUB_SWITCHES: Mapping[Source, str] = {"modelscope": "USE_MODELSCOPE_HUB", "openmind": "USE_OPENMIND_HUB"}
NO_ACCESS = SourceAccess()


def spec_from_entry(
    name: str, given: object, dataset_dir: str | Mapping[str, Any], access: SourceAccess = NO_ACCESS
) -> DatasetSpec:
    """One entry, checked, with defaults filled in. A `columns` or `tags` block replaces all defaults of its kind.

    Raises:
        DataError: an unknown key, a value of the wrong type, no place to load from, a source that is not implemented.
    """
    where = f"{INFO_NAME}: {name}"
    if not isinstance(given, Mapping):
        raise DataError("the entry is not an object", where=where, expected='{"file_name": ...}')
    entry = cast("Mapping[str, Any]", given)
    _check_keys(entry, _KEYS, where)
    _check_types(entry, where)
    formatting: str = entry.get("formatting") or "alpaca"
    row_format = find_format(formatting)
    columns = _block(entry, "columns", _COLUMNS, row_format.DEFAULT_COLUMNS, where)
    _check_numbers(formatting, columns, is_ranking=bool(entry.get("ranking")), where=where)
    source, location = _place(entry, where, dataset_dir)
    _check_options(entry, source, where)
    require_reachable(source, location, where, access)
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
        columns=columns,
        tags=_block(entry, "tags", _TAGS, row_format.DEFAULT_TAGS, where),
        media_dir=access.media_dir or _registry_folder(dataset_dir) if source == "file" else access.media_dir,
        access=access,
    )


def _check_types(entry: Mapping[str, Any], where: str) -> None:
    for key, value in entry.items():
        kind, expected = _KINDS[key]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise DataError(f"'{key}' has the wrong type", where=where, found=type(value).__name__, expected=expected)
    if (wanted := entry.get("num_samples")) is not None and wanted < 1:
        raise DataError("'num_samples' is too small", where=where, found=str(wanted), expected="a number from 1 up")


def _check_options(entry: Mapping[str, Any], source: Source, where: str) -> None:
    """What only makes sense with some sources, and packages that are missing."""
    if source in ("file", "cloud"):
        parse_split(entry.get("split") or "train", where)
        for key in ("subset", "folder"):
            if entry.get(key):
                note(f"{where}: '{key}' has no effect: only data sets on a hub have one", once=True)
    if source == "cloud":
        check_cloud_url(entry["cloud_file_name"])
    check_hub(source, where)


def _check_numbers(formatting: str, columns: Mapping[str, str | None], *, is_ranking: bool, where: str) -> None:
    """A margin belongs to a pair, a score to a single answer."""
    wrong = "score" if is_ranking else "margin"
    if columns.get(wrong):
        what = "a pair (ranking: true) has a margin" if is_ranking else "a margin is that of a pair"
        raise DataError(
            f"a column '{wrong}' that does not fit the rows",
            where=f"{where}: columns",
            found=what,
            expected="margin with ranking: true, score without it",
            fix="name the column as margin" if is_ranking else "set ranking: true, or name the column as score",
        )
    if columns.get("score") and formatting == "alpaca" and not columns.get("response"):
        raise DataError(
            "a column 'score' without an answer that it judges",
            where=f"{where}: columns",
            expected="a column of answers too",
            fix='name it: "response": "output"',
        )


def _place(entry: Mapping[str, Any], where: str, dataset_dir: str | Mapping[str, Any]) -> tuple[Source, str]:
    """Where the rows come from; of several places: a hub, then a script, then the cloud, then a file.

    Of several hubs Hugging Face, unless the environment chooses another one that the entry names.
    """
    hubs = {source: entry[key] for source, key in _HUB_KEYS.items() if entry.get(key)}
    for source in ("modelscope", "openmind"):
        if source in hubs and ("hub" not in hubs or chosen_hub() == source):
            return source, hubs[source]
    if "hub" in hubs:
        return "hub", hubs["hub"]
    if entry.get("script_url"):
        raise DataError(
            "'script_url' is not used: a loading script is foreign code",
            where=where,
            found=entry["script_url"],
            expected="file_name, cloud_file_name, or the url of a data set on a hub",
            fix="run the script yourself once, save its rows as .jsonl or .parquet, and give their file_name",
        )
    if entry.get("cloud_file_name"):
        return "cloud", entry["cloud_file_name"]
    if not entry.get("file_name"):
        expected = "file_name, cloud_file_name, hf_hub_url, ms_hub_url or om_hub_url"
        raise DataError("the entry names no place to load from", where=where, expected=expected)
    if (folder := _registry_folder(dataset_dir)) is None:
        raise DataError(
            "'file_name' is a file on another machine",
            where=where,
            found=f"{entry['file_name']} in {dataset_dir}",
            expected="an entry with hf_hub_url, ms_hub_url, om_hub_url or cloud_file_name",
            fix="download the repository, and set dataset_dir to its folder",
        )
    return "file", str(Path(folder) / entry["file_name"])


def _registry_folder(dataset_dir: str | Mapping[str, Any]) -> str | None:
    """The folder in which file names begin; None where the registry is remote."""
    if isinstance(dataset_dir, Mapping):
        return "."
    return None if dataset_dir.startswith(REMOTE) else dataset_dir


def require_reachable(source: Source, location: str, where: str, access: SourceAccess) -> None:
    """Offline there are files, and what `datasets` has in its cache.

    Raises:
        DataError: the data set lies elsewhere.
    """
    if access.is_offline and source in ("cloud", "modelscope", "openmind"):
        raise DataError(
            "offline is on, and this data set is read over the network",
            where=where,
            found=location,
            fix="download it, and name the file or folder in file_name",
        )


def chosen_hub() -> Source:
    """The hub that the environment chooses."""
    for source, variable in _HUB_SWITCHES.items():
        if os.environ.get(variable, "0").lower() in {"true", "y", "1"}:
            return source
    return "hub"


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
