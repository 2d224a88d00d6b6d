"""The hub of models and data sets when it is slow, broken or closed: bounded waits, and one sentence for each failure.

The client libraries are imported inside the functions; nothing is asked before one of them is called.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llamafactory.extras.log import info

_WAITS = (1.0, 2.0)
"""Seconds before the second and the third try."""
TOKEN_FIX = "log in (hf auth login), or set HF_TOKEN or hf_hub_token"


class HubError(Exception):
    """A repository cannot be had: `what` says why, `fix` what to do."""

    def __init__(self, what: str, fix: str) -> None:
        """Keeps both."""
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the hub says of a repository.

    Attributes:
        commit: that its revision is at now; None where it does not say.
        files: their paths.
    """

    commit: str | None
    files: tuple[str, ...]


def ask_hub(
    repository: str, kind: Literal["model", "dataset"], *, revision: str | None, token: str | None, is_patient: bool
) -> Answer:
    """The commit that a revision of a repository is at now, and its files.

    Args:
        repository: `user/name`.
        kind: of the repository.
        revision: branch, tag or commit; None: the main branch.
        token: of a user; None: the one that is logged in.
        is_patient: try three times where there is no answer.

    Raises:
        HubError: no answer in time (HF_HUB_ETAG_TIMEOUT for each try, 10 s), or the answer is no.
        ValueError: this is no name of a repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    bound_waits()
    for wait in (*_WAITS, None):
        try:
            found = HfApi().repo_info(
                repository, repo_type=kind, revision=revision, token=token,
                timeout=float(constants.HF_HUB_ETAG_TIMEOUT),
            )  # fmt: skip
            siblings: Any = getattr(found, "siblings", None) or ()
            return Answer(commit=found.sha, files=tuple(file.rfilename for file in siblings))
        except HFValidationError:
            raise
        except Exception as error:  # whatever the hub or the network raised, by either of two HTTP libraries
            what, fix = explain(error, repository if kind == "model" else f"datasets/{repository}")
            if wait is None or not is_patient or _is_refusal(error):
                raise HubError(what, fix) from error
            info(f"{repository}: {what}; trying again")
            time.sleep(wait)
    raise AssertionError("unreachable")


@cache
def bound_waits() -> None:
    """Gives every request of huggingface_hub a time limit; some have none, and would wait for a silent hub for ever.

    It is that of downloads, HF_HUB_DOWNLOAD_TIMEOUT (10 s), for each connection and each read; no other one is longer.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def bound(request: Any) -> None:
        given, most = request.extensions.get("timeout") or {}, float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        phases = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {phase: min(given.get(phase) or most, most) for phase in phases}

    def make_client() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
        return client

    set_client_factory(make_client)


def is_of_network(error: BaseException) -> bool:
    """Whether an error of the hub, or of the way there, is behind this one."""
    origin = _origin(error)
    return _status(origin) is not None or _is_of_transport(origin)


def explain(error: BaseException, repository: str) -> tuple[str, str]:
    """What went wrong with a repository on the hub, and what to do.

    Args:
        error: what a client library raised; the first error of its chain that tells something counts.
        repository: `user/name`.

    Returns:
        A sentence and a fix.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    error = _origin(error)
    hub, status = constants.ENDPOINT, _status(error)
    if isinstance(error, GatedRepoError):
        page = f"{hub}/{repository}"
        return (
            f"its owner gives access on request only ({hub} answered {status})",
            f"ask for it at {page}; {TOKEN_FIX}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has no such repository, or a private one ({status})", f"check the name; or {TOKEN_FIX}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository at {hub} has no such revision", "check model_revision"
    if status in (401, 403):
        return f"{hub} refuses access ({status})", f"the token may be wrong or too old: {TOKEN_FIX}"
    why = f"status {status}" if status else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return (
        f"{hub} gives no answer ({why})",
        "check the network and try again; or download it where there is one, and give the folder",
    )


def _is_refusal(error: BaseException) -> bool:
    """Whether the hub answered, and the answer is no: another try would get the same one."""
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _origin(error: BaseException) -> BaseException:
    """The error of the hub or the network in a chain of errors; the first one where there is none."""
    found: BaseException | None = error
    while found is not None:
        if _status(found) is not None or _is_of_transport(found):
            return found
        found = found.__cause__ or found.__context__
    return error


def _is_of_transport(error: BaseException) -> bool:
    """Of the HTTP library: httpx2, or httpx before huggingface_hub 2."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2")


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
