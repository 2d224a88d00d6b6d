"""`data cache`: which tokenised rows are kept, and away with those that nobody uses. Needs no GPU stack."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.commands.data_inputs import print_json, split_words
from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem
from llamafactory.extras.suggest import did_you_mean

if TYPE_CHECKING:
    from llamafactory.data.kept_rows import KeptRows

_ACTIONS = ("list", "prune")
_PLACES = ("cache_dir", "tokenized_path")
_CONFIG_FILES = {".yaml", ".yml", ".json"}


def main(argv: list[str]) -> int:
    """List the tokenised data sets, or remove some.

    Returns:
        0.

    Raises:
        ConfigError: unknown words, or `prune` without a limit.
        LlamaFactoryError: files that cannot be removed.
    """
    words, own = split_words("cache", argv)
    settings = [word for word in words if "=" in word or Path(word).suffix in _CONFIG_FILES]
    action, unused_days, max_gb = _read([word for word in words if word not in settings], own)
    from llamafactory.data.kept_rows import choose_unneeded, find_kept

    _refuse_idle(settings, own)
    root = Path(own["folder"]) if "folder" in own else _root_of(settings)
    kept = find_kept(root)
    if action == "list":
        return _show(root, kept, as_json="json" in own)
    max_bytes = None if max_gb is None else int(max_gb * 1e9)
    chosen = choose_unneeded(kept, unused_days=unused_days, max_bytes=max_bytes)
    is_dry = "dry-run" in own
    removed = chosen if is_dry else [one for one in chosen if _remove(one)]
    if "json" in own:
        print_json({"folder": str(root), "removed": [_record(one) for one in removed], "dry_run": is_dry})
        return 0
    for one in removed:
        print(f"{'would remove' if is_dry else 'removed'} {_line(one)}")
    for one in chosen:
        if one not in removed:
            print(f"left, a run is writing to it: {one.folder}")
    freed = sum(one.num_bytes for one in removed) / 1e6
    print(f"{len(removed)} of {len(kept)} data sets, {freed:,.1f} MB, {'would go' if is_dry else 'removed'}")
    return 0


def _refuse_idle(settings: list[str], own: Mapping[str, str]) -> None:
    """Stops where a word would be passed over, because prune would then remove rows from another folder."""
    for word in settings:
        key = word.partition("=")[0]
        if "folder" in own or ("=" in word and key not in _PLACES):
            raise ConfigError(
                Problem(
                    key=key,
                    message="does not say where tokenised rows are"
                    if "folder" not in own
                    else "--folder is given too",
                    allowed=f"a configuration file, {', '.join(f'{name}=PATH' for name in _PLACES)}, or --folder PATH",
                    fix="give one place",
                )
            )


def _root_of(settings: list[str]) -> Path:
    """The folder in which a run of this configuration keeps its rows.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    from llamafactory.data.token_cache import usual_root
    from llamafactory.hparams.read import read_source

    given = {item.key: str(item.value) for item in read_source(settings) if item.value not in (None, "")}
    if "tokenized_path" in given:
        return Path(given["tokenized_path"])
    return usual_root(Path(given["cache_dir"]) if "cache_dir" in given else None)


def _show(root: Path, kept: list[KeptRows], *, as_json: bool) -> int:
    if as_json:
        print_json({"folder": str(root), "kept": [_record(one) for one in kept]})
        return 0
    for one in kept:
        print(_line(one))
    print(f"{len(kept)} data sets, {sum(one.num_bytes for one in kept) / 1e6:,.1f} MB in {root}")
    return 0


def _line(one: KeptRows) -> str:
    used = datetime.fromtimestamp(one.last_used).strftime("%Y-%m-%d %H:%M")
    what = f"{one.name} ({one.use})" if one.is_complete else "not finished"
    return f"{used}  {one.num_bytes / 1e6:>10,.1f} MB  {what}  {one.folder.name}"


def _record(one: KeptRows) -> dict[str, object]:
    return {
        "name": one.name,
        "use": one.use,
        "bytes": one.num_bytes,
        "last_used": datetime.fromtimestamp(one.last_used).astimezone().isoformat(timespec="seconds"),
        "complete": one.is_complete,
        "folder": str(one.folder),
    }


def _remove(one: KeptRows) -> bool:
    from llamafactory.data.kept_rows import remove

    try:
        return remove(one)
    except OSError as error:
        raise LlamaFactoryError(f"{one.folder} cannot be removed: {error.strerror or error}") from error


def _read(words: list[str], own: dict[str, str]) -> tuple[str, float | None, float | None]:
    action = words[0] if words else "list"
    problems: list[Problem] = []
    if action not in _ACTIONS:
        fix = did_you_mean(action, _ACTIONS) or "llamafactory-cli data cache --help"
        problems.append(Problem(key=action, message="unknown word", allowed=", ".join(_ACTIONS), fix=fix))
    problems += [Problem(key=word, message="unknown word", fix="remove it") for word in words[1:]]
    limits: dict[str, float] = {}
    for key in ("unused-days", "max-gb"):
        if (text := own.get(key)) is None:
            continue
        try:
            limits[key] = float(text)
        except ValueError:
            limits[key] = -1.0
        if not 0 <= limits[key] < float("inf"):
            allowed = "a number from 0 up"
            problems.append(
                Problem(key=f"--{key}", given=text, message="wrong value", allowed=allowed, fix=f"--{key} 30")
            )
    if action == "prune" and not limits and not problems:
        fix = "--unused-days 30, or --max-gb 20"
        problems.append(Problem(key="data cache prune", message="no limit is given", fix=fix))
    if action == "list":
        given = [f"--{key}" for key in ("unused-days", "max-gb", "dry-run") if key in own]
        problems += [Problem(key=key, message="is for prune", fix="data cache prune " + key) for key in given]
    if problems:
        raise ConfigError(problems)
    return action, limits.get("unused-days"), limits.get("max-gb")
