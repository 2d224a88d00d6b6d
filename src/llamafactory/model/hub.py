"""Models on the hub: which commit a run takes, asked for once, and the copy on this machine where nobody answers.

Everything that is loaded later names this commit, so that a change of the repository in the middle of a run changes
nothing, and so that files which are here already need no network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llamafactory.extras import log
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.hub import HubError, ask_hub


@dataclass(frozen=True, kw_only=True)
class Revision:
    """What to load of a repository.

    Attributes:
        name: a commit; where none is known, the branch or tag that was asked for.
        is_local: only files that are on this machine may be used.
        files: paths of those that the hub has; empty where it was not asked.
    """

    name: str
    is_local: bool
    files: tuple[str, ...] = ()


_pins: dict[str, str] = {}
_found: dict[str, str] = {}


@contextmanager
def pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Models are taken at these commits while the block lasts, and `found_revisions` tells of this block only.

    Args:
        commits: as `found_revisions` gives them.
    """
    _found.clear()
    _pins.update(commits)
    try:
        yield
    finally:
        _pins.clear()


def found_revisions() -> dict[str, str]:
    """`user/name@revision` -> the commit that was taken, for all that was asked for so far."""
    return dict(_found)


def find_revision(
    repository: str, *, revision: str, cache_dir: str | None, token: str | None, offline: bool
) -> Revision:
    """The commit of a model's repository that this process uses from now on; a pinned one where there is one.

    A hub that does not answer, or refuses, costs a run with a copy on this machine nothing: it is used, and that is
    said.

    Args:
        repository: `user/name`.
        revision: branch, tag or commit.
        cache_dir: of the hub's files; None: their usual place.
        token: of a user; None: the one that is logged in.
        offline: ask nobody.

    Raises:
        LlamaFactoryError: there is no answer, or a refusal, and no copy.
    """
    key = f"{repository}@{revision}"
    wanted = _pins.get(key, revision)
    found = _ask(repository, revision=wanted, cache_dir=cache_dir, token=token, offline=offline)
    _found[key] = found.name
    return found


@cache
def _ask(repository: str, *, revision: str, cache_dir: str | None, token: str | None, offline: bool) -> Revision:
    from huggingface_hub import is_offline_mode

    copy = _commit_of_copy(repository, revision, cache_dir)
    if offline or is_offline_mode():
        return Revision(name=copy or revision, is_local=True)
    try:
        answer = ask_hub(repository, "model", revision=revision, token=token, is_patient=copy is None)
    except ValueError:  # no name of a repository: who loads it says so
        return Revision(name=revision, is_local=False)
    except HubError as error:
        if copy is None:
            raise LlamaFactoryError(
                f"cannot load {repository!r} ({revision}) from the hub: {error.what}\n    fix:     {error.fix}"
            ) from error
        log.warn(f"{repository}: {error.what}. The copy on this machine is used (commit {copy[:12]})", once=True)
        return Revision(name=copy, is_local=True)
    commit = answer.commit or revision
    _note(_folder(repository, cache_dir) / "refs" / revision, commit)
    return Revision(name=commit, is_local=False, files=answer.files)


def _commit_of_copy(repository: str, revision: str, cache_dir: str | None) -> str | None:
    """The commit of which files are on this machine."""
    folder = _folder(repository, cache_dir)
    note = folder / "refs" / revision
    commit = note.read_text(encoding="ascii").strip() if note.is_file() else revision
    return commit if (folder / "snapshots" / commit).is_dir() else None


def _note(path: Path, commit: str) -> None:
    """Notes the commit of a branch where the hub's client does; it writes nothing where it is asked for a commit."""
    if path.name == commit or (path.is_file() and path.read_text(encoding="ascii") == commit):
        return
    with suppress(OSError):  # a folder that is only read
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.write_text(commit, encoding="ascii")
        staging.replace(path)


def _folder(repository: str, cache_dir: str | None) -> Path:
    """Where the hub's client keeps a model's repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    return root / repo_folder_name(repo_id=repository, repo_type="model")
