"""Which packages are installed, and what to type to get a missing one. Never imports the package asked about."""

from __future__ import annotations

from functools import cache
from importlib import metadata, util


@cache
def is_installed(name: str) -> bool:
    """Whether the module `name` can be imported. `name` is an import name without dots, such as `bitsandbytes`."""
    return util.find_spec(name) is not None


@cache
def version(name: str) -> str | None:
    """Return the installed version of the distribution `name`, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install_hint(extra: str) -> str:
    """Return the command that installs one of this project's extras."""
    return f'pip install "llamafactory[{extra}]"'
