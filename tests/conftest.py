"""What all tests share: no network, one computing thread, the reference data, and the embedded model (made once)."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models in tests are tiny: a second thread doubles the CPU time
os.environ.setdefault("MPLBACKEND", "Agg")

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A loaded machine is slow at times; what is fast enough is measured in benchmarks/.
settings.register_profile("project", settings(), deadline=None)
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of single tests."""
    parser.addoption("--stops", type=int, default=2, help="signals of the long fault test in each phase")
    parser.addoption("--kills", type=int, default=100, help="kills of the long fault test, over all its cells")


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


@pytest.fixture(scope="session", autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave tokenised rows or reference log-probabilities in this user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMAFACTORY_REFERENCE_CACHE", str(tmp_path_factory.mktemp("references")))
        patch.setenv("LLAMAFACTORY_TOKEN_CACHE", str(tmp_path_factory.mktemp("tokens")))
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


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Makes the transformers config of a two-layer model: `tiny_config("llama", vocab_size=64)`."""

    def make(model_type: str = "llama", **changes: Any) -> Any:
        from transformers import AutoConfig

        options: dict[str, Any] = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
        }
        return AutoConfig.for_model(model_type, **(options | changes))

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Any]]:
    """Makes training examples with random ids: `make_examples(lengths, vocab_size=96, seed=0)`."""

    def make(lengths: Sequence[int], vocab_size: int = 96, seed: int = 0, supervised: float = 0.5) -> list[Any]:
        import numpy as np

        from llamafactory.data.types import IGNORE_INDEX, Example

        rng = np.random.default_rng(seed)
        examples = []
        for length in lengths:
            ids = rng.integers(1, vocab_size, size=length).astype(np.int32)
            labels = np.where(rng.random(length) < supervised, ids, np.int32(IGNORE_INDEX))
            examples.append(Example(input_ids=ids, labels=labels.astype(np.int32)))
        return examples

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(embedded_model_dir: Path, tiny_config: Callable[..., Any], tmp_path_factory: Any) -> Path:
    """A two-layer model with random weights and the embedded model's tokenizer: a run takes seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    torch.manual_seed(0)
    options = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=True, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train_config(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes the config of a short run on the tiny model: `train_config(max_steps=3)`."""

    def make(command: str = "train", **changes: Any) -> Any:
        from llamafactory.compose import load_config

        rows = [
            {
                "instruction": f"Repeat the word number {number}.",
                "input": "",
                "output": f"word {number} " * (1 + number % 5),
            }
            for number in range(20)
        ]
        data = tmp_path / "data"
        if not data.exists():
            data.mkdir()
            (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")
        options = {
            "model_name_or_path": str(tiny_model_dir),
            "dataset": "rows",
            "dataset_dir": str(data),
            "template": "chatml",
            "do_train": True,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "cutoff_len": 128,
        }
        return load_config(options | changes, command=command)

    return make
