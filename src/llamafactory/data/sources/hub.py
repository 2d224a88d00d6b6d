"""Data sets on Hugging Face, ModelScope and OpenMind. Code that comes with a data set is never run.

`datasets` from version 4 on runs no loading scripts. ModelScope and OpenMind give a folder of files, which `datasets`
reads as it reads any folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory.data.sources.row import SourceRow
from llamafactory.data.types import DatasetSpec, SourceAccess
from llamafactory.extras.errors import DataError
from llamafactory.extras.packages import install_hint, is_installed

_LABELS = {"hub": "the hub", "modelscope": "ModelScope", "openmind": "OpenMind"}
PACKAGES = {"modelscope": "modelscope", "openmind": "openmind_hub"}
"""Source -> the module that it needs; the extra that installs it has the source's name."""
INFO_NAME = "dataset_info.json"


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
        rows = _load(spec)
        for number, values in enumerate(rows, start=1):
            yield SourceRow(origin=f"{spec.name}#{number}", values=values)
    except Exception as error:  # whatever the hub, the network or the loader raised
        raise DataError(
            f"the data set cannot be loaded from {_LABELS[spec.source]}",
            where=f"{spec.name} ({spec.location})",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            fix="check the name and the network; a local copy works through file_name",
        ) from error


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
        raise DataError(
            f"{INFO_NAME} cannot be loaded from the hub",
            where=f"REMOTE:{repository}",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            fix="check the name and the network; a local copy works through dataset_dir",
        ) from error
