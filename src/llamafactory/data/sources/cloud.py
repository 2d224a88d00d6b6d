"""Files in S3 and in Google's cloud storage, through fsspec. Read where they are, never copied whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamafactory.data.sources.files import require_one_type
from llamafactory.data.sources.row import SourceFile
from llamafactory.extras.errors import DataError
from llamafactory.extras.packages import install_hint, is_installed

PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Protocol -> module, and the extra of this project that installs it."""


def check_cloud_url(url: str) -> None:
    """Whether such an address can be read here; asks nobody.

    Raises:
        DataError: another protocol, or a package is missing.
    """
    protocol, mark, rest = url.partition("://")
    if not mark or not rest or protocol not in PACKAGES:
        expected = "s3://BUCKET/FILE, gs://BUCKET/FILE or gcs://BUCKET/FILE"
        raise DataError("not an address in the cloud", where="cloud_file_name", found=url, expected=expected)
    module, extra = PACKAGES[protocol]
    if not is_installed(module):
        raise DataError(f"{protocol}:// needs the package {module}", where=url, fix=install_hint(extra))


def list_cloud_files(url: str) -> list[SourceFile]:
    """The file at this address, or all files of a folder, sorted by name. Asked without credentials first.

    Raises:
        DataError: nothing there, no access, or a type that is not read.
    """
    check_cloud_url(url)
    protocol = url.partition("://")[0]
    failures: list[str] = []
    for options in ({"anon": True} if protocol == "s3" else {"token": "anon"}, {}):
        try:
            filesystem, paths = _list(protocol, url, options)
        except Exception as error:  # whatever the client, the network or the server raised
            failures.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
            continue
        require_one_type([path.rsplit("/", 1)[-1] for path in paths], url, first=url)
        return [_source_file(filesystem, protocol, path, number) for number, path in enumerate(paths)]
    raise DataError(
        "the file in the cloud cannot be read",
        where=url,
        found=f"without credentials {failures[0]}; with credentials {failures[1]}",
        fix="check the address, and the credentials that the provider's own command line tool uses",
    )


def _list(protocol: str, url: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The file system, and the files at the address. One byte is read, to know that the rest can be."""
    import fsspec

    filesystem: Any = fsspec.filesystem(protocol, **options)
    path = filesystem._strip_protocol(url)
    paths = [path]
    if filesystem.isdir(path):
        found = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
        paths = sorted(name for name in found if not name.rsplit("/", 1)[-1].startswith(".") and name != path)
    if paths:
        with filesystem.open(paths[0], "rb") as stream:
            stream.read(1)
    return filesystem, paths


def _source_file(filesystem: Any, protocol: str, path: str, number: int) -> SourceFile:
    where = f"{protocol}://{path}"
    opener = _opener(filesystem, path, where)
    return SourceFile(name=path.rsplit("/", 1)[-1], where=where, open=opener, number=number)


def _opener(filesystem: Any, path: str, where: str) -> Callable[[], Any]:
    def open_remote() -> Any:
        try:
            return filesystem.open(path, "rb")
        except Exception as error:  # whatever the client, the network or the server raised
            found = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            raise DataError("the file in the cloud cannot be read", where=where, found=found) from error

    return open_remote
