"""A tiny model, its tokenizer and a few rows; runs on them take about a second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.cells import COMMON, DATASETS, REWARDS
from tests.faults.harness import Place, Tally, Zygote, zygote


@pytest.fixture(scope="session")
def faults_model(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """A two-layer model with a tokenizer of a few hundred tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("faults-model")
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*special, *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runner(faults_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process that runs are forked from."""
    with zygote() as one:
        folder = tmp_path_factory.mktemp("warm")
        words = write_place(folder, faults_model, num_rows=4, val_size="2", max_steps="1", eval_on_start="true")
        assert one.ask({"warm": ["train", *words, f"output_dir={folder / 'out'}"]})["code"] == 0
        yield one


def write_place(folder: Path, model: Path, num_rows: int, **changes: str) -> tuple[str, ...]:
    """Writes rows into a folder; the words of a run on them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"Say {n}.", "output": f"{n} " * (2 + n % 5)} for n in range(num_rows)]
    (folder / "rows.json").write_text(json.dumps(rows))
    more = [{"instruction": f"And {n}?", "output": f"ünd {n} " * (1 + n % 3)} for n in range(num_rows // 2)]
    (folder / "more.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in more))
    pairs = [{**row, "chosen": row.pop("output"), "rejected": f"no {n}"} for n, row in enumerate(map(dict, rows))]
    judged = [{**row, "kto_tag": n % 2 == 0} for n, row in enumerate(rows)]
    texts = [{"text": f"{row['instruction']} {row['output']}" * 2} for row in rows]
    for name, content in {"pairs": pairs, "judged": judged, "texts": texts}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text(json.dumps(DATASETS))
    (folder / "rewards.py").write_text(REWARDS)
    options = {"model_name_or_path": str(model), "dataset_dir": str(folder), **COMMON, **changes}
    return tuple(f"{key}={value.replace('{folder}', str(folder))}" for key, value in options.items())


@pytest.fixture
def make_place(runner: Zygote, faults_model: Path, tmp_path: Path) -> Any:
    """Makes a `Place` for a configuration: `make_place(save_steps="1", folder="a b/ü")`."""

    def make(folder: str = "place", num_rows: int = 14, **changes: str) -> Place:
        here = tmp_path / folder
        return Place(zygote=runner, folder=here, words=write_place(here, faults_model, num_rows, **changes))

    return make


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts over the session; printed and written at its end."""
    counts = Tally()
    yield counts
    if counts.runs:
        path = Path(request.config.rootpath) / "build" / "faults.json"
        counts.write(path, os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid()))
        print(f"\nfaults: {counts} ({path})")
