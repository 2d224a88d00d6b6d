"""Rules about the paths of a configuration, and about resuming: does the model exist, can the output be written?

They look at names and permissions only; no file is opened for its content.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from llamafactory.extras.errors import Problem
from llamafactory.extras.suggest import near_matches
from llamafactory.hparams.run_config import RunConfig

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def check_model_path(config: RunConfig) -> Problem | None:
    """A local model is a folder with a config.json; anything else must look like a hub id."""
    name = config.model.model_name_or_path
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        return _check_model_folder(path)
    if path.is_file():
        return Problem(
            key="model_name_or_path", message="is a file", allowed="a folder, or a hub id", fix="give its folder"
        )
    return _check_absent("model_name_or_path", name)


def _check_model_folder(path: Path) -> Problem | None:
    if (path / "config.json").is_file():
        return None
    key = "model_name_or_path"
    if (path / "adapter_config.json").is_file():
        fix = "put it into adapter_name_or_path, and the model that it was trained on here"
        return Problem(key=key, message="the folder holds an adapter, not a model", fix=fix)
    inside = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
    fix = f"did you mean {path / inside[-1]}?" if inside else "give the folder that holds config.json and the weights"
    return Problem(key=key, message="the folder has no config.json", fix=fix)


def check_adapter_paths(config: RunConfig) -> Iterator[Problem]:
    """A local adapter is a folder with an adapter_config.json."""
    key = "adapter_name_or_path"
    for name in config.model.adapter_name_or_path:
        path = Path(name) / (config.model.adapter_folder or "")
        if path.is_file():
            yield Problem(key=key, message=f"{name} is a file", allowed="a folder, or a hub id", fix="give its folder")
        elif not path.is_dir():
            absent = _check_absent(key, name)
            if absent:
                yield absent
        elif not (path / "adapter_config.json").is_file():
            inside = sorted(entry.name for entry in path.iterdir() if (entry / "adapter_config.json").is_file())
            fix = f"did you mean {path / inside[-1]}?" if inside else "give the folder that training wrote"
            yield Problem(key=key, message=f"{path} has no adapter_config.json", fix=fix)


def _check_absent(key: str, name: str) -> Problem | None:
    """A name that is no file or folder: a hub id, or a path that is wrong."""
    path = Path(name)
    near = near_matches(path.name, _folders_beside(path))
    if _is_path_like(name) or ("/" in name and near):
        fix = " or ".join(str(path.parent / found) for found in near)
        return Problem(
            key=key, message=f"no such folder: {name}", fix=f"did you mean {fix}?" if near else "check the path"
        )
    if not _HUB_ID.fullmatch(name):
        return Problem(
            key=key, message=f"neither a folder nor a hub id: {name}", allowed="OWNER/NAME", fix="check the name"
        )
    return None


def _is_path_like(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.endswith(("/", "\\")) or name.count("/") > 1 or "\\" in name


def _folders_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def check_output_paths(config: RunConfig) -> Iterator[Problem]:
    """The folder that the command writes can be made and written."""
    if config.command == "train" and config.train.output_dir:
        yield from _check_writable("output_dir", Path(config.train.output_dir))
    if config.command == "export" and config.export.export_dir:
        yield from _check_writable("export_dir", Path(config.export.export_dir))


def _check_writable(key: str, path: Path) -> Iterator[Problem]:
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"{nearest} is a file"
        yield Problem(key=key, message=what, allowed="a folder", fix="choose another folder, or move the file away")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem(
            key=key, message=f"{nearest} cannot be written", fix="choose another folder, or change its permissions"
        )


def check_resume_path(config: RunConfig) -> Problem | None:
    """A checkpoint that is named must exist."""
    place = config.train.resume_from_checkpoint
    if config.command != "train" or not isinstance(place, str):
        return None
    path = Path(place)
    if path.is_dir():
        return None
    near = near_matches(path.name, _folders_beside(path))
    fix = f"did you mean {path.parent / near[0]}?" if near else "true takes the newest checkpoint in output_dir"
    return Problem(key="resume_from_checkpoint", message=f"no such folder: {place}", fix=fix)


def check_allowed_changes(config: RunConfig) -> Iterator[Problem]:
    """`allow_change` names options, the rows, or the tokenizer."""
    known = {*config.flat(), "data", "tokenizer"}
    for name in config.train.allow_change:
        if config.command == "train" and name not in known:
            near = near_matches(name, known)
            fix = f"did you mean '{near[0]}'?" if near else "the refusal names the keys as they are wanted here"
            yield Problem(key="allow_change", message=f"'{name}' is no option of this run", fix=fix)


_INPUTS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model",
           "reward_model_adapters")  # fmt: skip


def check_inputs_outlive_the_start(config: RunConfig) -> Iterator[Problem]:
    """What a run starts from does not lie where `overwrite_output_dir` removes files before there are new ones."""
    train = config.train
    starts_anew = train.do_train and train.overwrite_output_dir and not train.resume_from_checkpoint
    if config.command != "train" or not (starts_anew and train.output_dir):
        return
    output, options = Path(train.output_dir).resolve(), config.flat()
    for key in _INPUTS:
        value = options.get(key) or ()
        for name in [value] if isinstance(value, str) else value:
            if Path(name).is_dir() and Path(name).resolve().is_relative_to(output):
                yield Problem(
                    key=key,
                    message=f"{name} lies in output_dir, which overwrite_output_dir empties: it would be lost",
                    fix="choose another output_dir",
                )


PATH_CHECKS = (
    check_model_path,
    check_adapter_paths,
    check_output_paths,
    check_resume_path,
    check_allowed_changes,
    check_inputs_outlive_the_start,
)
