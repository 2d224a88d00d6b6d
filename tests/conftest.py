"""What all tests share: no network, one computing thread, the reference data, and the embedded model (made once)."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models in tests are tiny: a second thread doubles the CPU time
os.environ.setdefault("MPLBACKEND", "Agg")

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A loaded machine is slow at times; what is fast enough is measured in benchmarks/.
settings.register_profile("project", settings(), deadline=None)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Any connection that would leave this machine is an error."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"tests use no network, but something connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir(repo_dir: Path) -> Path:
    """Reference data that lies beside the repository, not in it."""
    folder = repo_dir.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference data in ../shared, which is not on this machine")
    return folder


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """The embedded model as a folder in this user's real cache; converted by the first test that asks for it."""
    from llamafactory.model.embedded import INSTALL_COMMAND, find_packaged_model, resolve_model_path

    if find_packaged_model() is None:
        pytest.skip(f"needs the embedded model: {INSTALL_COMMAND}")
    return Path(resolve_model_path("SmolLM2-135M-Instruct"))


@pytest.fixture(scope="session")
def golden_tokenizer(embedded_model_dir: Path) -> Any:
    """The embedded tokenizer as the reference token ids were made: without the digit split.

    Some GGUF readers leave out the split of digits that the published tokenizer has, the one behind the reference
    files among them. Only comparisons with those files want this tokenizer.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
