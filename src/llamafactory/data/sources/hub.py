"""Data sets on Hugging Face, ModelScope and OpenMind. Code that comes with a data set is never run.

`datasets` from version 4 on runs no loading scripts. ModelScope and OpenMind give a folder of files, which `datasets`
reads as it reads any folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamafactory.data.sources.row import SourceRow
from llamafactory.data.types import DatasetSpec, SourceAccess
from llamafactory.extras.errors import DataError
from llamafactory.extras.hub import HubError, ask_hub, bound_waits, explain, is_of_network
from llamafactory.extras.log import debug, warn
from llamafactory.extras.packages import install_hint, is_installed

_LABELS = {"hub": "the hub", "modelscope": "ModelScope", "openmind": "OpenMind"}
PACKAGES = {"modelscope": "modelscope", "openmind": "openmind_hub"}
"""Source -> the module that it needs; the extra that installs it has the source's name."""
INFO_NAME = "dataset_info.json"
_ON = {"1", "ON", "YES", "TRUE"}


def check_hub(source: str, where: str) -> None:
    """Whether data sets of this hub can be read here; asks nobody.

    Raises:
        DataError: a package is missing.
    """
    if source in PACKAGES and not is_installed(PACKAGES[source]):
        what = f"data sets on {_LABELS[source]} need the package {PACKAGES[source]}"
        raise DataError(what, where=where, fix=install_hint(source))


def read_hub(spec: DatasetSpec) -> Iterator[SourceRow]:
    """The rows of a data set on a hub.

    Raises:
        DataError: whatever the hub, the network or the loader complains about, in one line.
    """
    check_hub(spec.source, spec.name)
    try:
        rows = _open(spec)
        for number, values in enumerate(rows, start=1):
            yield SourceRow(origin=f"{spec.name}#{number}", values=values)
    except Exception as error:  # whatever the hub, the network or the loader raised
        found, fix = _explain(error, spec.location)
        raise DataError(
            f"the data set cannot be loaded from {_LABELS[spec.source]}",
            where=f"{spec.name} ({spec.location})",
            found=found,
            fix=f"{fix}; a local copy works through file_name",
        ) from error


def _explain(error: BaseException, repository: str) -> tuple[str, str]:
    """What is wrong, and what to do; errors that are not of the network keep their words."""
    if isinstance(error, HubError):
        return error.what, error.fix
    if is_of_network(error):
        return explain(error, f"datasets/{repository}")
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", "check the name and the network"


def _open(spec: DatasetSpec) -> Any:
    """The data set; what `datasets` keeps of it on this machine where the hub does not answer, or refuses.

    Raises:
        HubError: there is no answer, or a refusal, and nothing is kept.
    """
    access = spec.access
    if spec.source in PACKAGES or access.is_offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in _ON:
        return _load(spec)
    try:
        ask_hub(spec.location, "dataset", revision=None, token=access.hf_token, is_patient=False)
    except HubError as error:
        with _from_cache_only():
            try:
                rows = _load(spec)
                warn(f"{spec.location}: {error.what}. The copy on this machine is used", once=True)
                return rows
            except Exception as failure:  # nothing is kept: whatever `datasets` says of that
                debug(f"{spec.location}: {failure}")
        ask_hub(spec.location, "dataset", revision=None, token=access.hf_token, is_patient=True)
    return _load(spec)


@contextmanager
def _from_cache_only() -> Iterator[None]:
    """`datasets` asks nobody; else it waits for minutes before it looks at what it has."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _load(spec: DatasetSpec) -> Any:
    import datasets

    access = spec.access
    location, options = spec.location, {}
    if spec.source in PACKAGES:
        location = _DOWNLOADS[spec.source](spec.location, access)
    elif access.hf_token:
        options["token"] = access.hf_token
    if access.cache_dir and not access.is_streaming:
        options["cache_dir"] = access.cache_dir
    return datasets.load_dataset(
        location,
        name=spec.subset,
        data_dir=spec.folder,
        split=spec.split,
        streaming=access.is_streaming,
        **options,
    )


def _download_modelscope(repository: str, access: SourceAccess) -> str:
    from modelscope.hub.snapshot_download import (  # pyright: ignore[reportMissingImports]
        dataset_snapshot_download,
    )

    return dataset_snapshot_download(repository, cache_dir=access.cache_dir, token=access.ms_token)


def _download_openmind(repository: str, access: SourceAccess) -> str:
    from openmind_hub import snapshot_download  # pyright: ignore[reportMissingImports]

    return snapshot_download(repository, repo_type="dataset", cache_dir=access.cache_dir, token=access.om_token)


_DOWNLOADS: Mapping[str, Callable[[str, SourceAccess], str]] = {
    "modelscope": _download_modelscope,
    "openmind": _download_openmind,
}


def download_registry(repository: str, access: SourceAccess) -> Path:
    """The `dataset_info.json` of a data set repository on the Hugging Face hub, in the local cache.

    Raises:
        DataError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    bound_waits()
    try:
        return Path(
            hf_hub_download(
                repository,
                INFO_NAME,
                repo_type="dataset",
                cache_dir=access.cache_dir,
                token=access.hf_token,
                local_files_only=access.is_offline,
            )
        )
    except Exception as error:  # whatever the hub or the network raised
        found, fix = _explain(error, repository)
        raise DataError(
            f"{INFO_NAME} cannot be loaded from the hub",
            where=f"REMOTE:{repository}",
            found=found,
            fix=f"{fix}; a local copy works through dataset_dir",
        ) from error
