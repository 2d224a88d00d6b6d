"""The cache as its users meet it: warm starts, kills, two processes at once, damage, a named folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamafactory.data import tokenised
from llamafactory.data.pipeline import PreparedData, prepare_data
from llamafactory.data.template_choice import template_of
from llamafactory.data.word_cache import WordEncoder
from llamafactory.extras import log
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

Make = Callable[..., DataConfig]
CHILD = """
import sys, time
from tokenizers import Tokenizer
from llamafactory.data import tokenised
from llamafactory.data.pipeline import prepare_data
from llamafactory.data.template_choice import build_template
from llamafactory.hparams.data import DataConfig

class Plain:
    backend_tokenizer = Tokenizer.from_file(sys.argv[1])
    chat_template = bos_token = None
    eos_token = "<|im_end|>"

tokenised.ROWS_PER_SHARD = 8
encode_shard = tokenised.encode_shard
def slowly(*args):
    time.sleep(float(sys.argv[4]))
    print("shard", flush=True)
    return encode_shard(*args)
tokenised.encode_shard = slowly
data = DataConfig(dataset=("rows",), dataset_dir=sys.argv[2], tokenized_path=sys.argv[3])
prepare_data(data, build_template("chatml", Plain), Plain, seed=1)
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "ROWS_PER_SHARD", 8)


@pytest.fixture
def chatml(data_config: Make) -> Make:
    """`data_config` with a named template."""
    return partial(data_config, template="chatml")


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {number}.", "input": "", "output": f"{{{{name}}}}: {number} " * (1 + number % 5)}
        for number in range(count)
    ]


def prepare(data: DataConfig, tokenizer: Any, cache_dir: Path | None = None, **options: Any) -> PreparedData:
    return prepare_data(data, template_of(data, tokenizer), tokenizer, seed=1, cache_dir=cache_dir, **options)


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMAFACTORY_TOKEN_CACHE", str(tmp_path / "tokens"))
    return tmp_path / "tokens"


def test_a_warm_start_gives_the_same_and_says_the_same(
    chatml: Make, tokenizer: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    listed = rows(200)
    listed[3]["output"] = ""
    data = chatml(listed, cutoff_len=48)
    cold = prepare(data, tokenizer, output_dir=tmp_path / "cold")
    said = capsys.readouterr().err
    assert "placeholder" in said
    assert "1 of 200 rows are not used" in said
    monkeypatch.setattr(log, "_said_once", set())
    monkeypatch.setattr(tokenised, "encode_shard", None)  # nothing may be tokenised now
    warm = prepare(data, tokenizer, output_dir=tmp_path / "warm")
    assert capsys.readouterr().err == said
    assert warm.report == cold.report
    assert [(tmp_path / name / "bad_rows.jsonl").read_text() for name in ("cold", "warm")][0].count("\n") == 1
    assert (tmp_path / "cold" / "bad_rows.jsonl").read_text() == (tmp_path / "warm" / "bad_rows.jsonl").read_text()
    for one, other in zip(warm.train, cold.train, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
    assert len(list(own_cache.glob("*/*.safetensors"))) == 25


def test_shards_hold_what_one_piece_holds(
    chatml: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = chatml(rows(50), cutoff_len=48, tokenized_path=str(tmp_path / "small"))
    small = prepare(data, tokenizer)
    monkeypatch.setattr(tokenised, "ROWS_PER_SHARD", 4096)
    whole = prepare(data.model_copy(update={"tokenized_path": str(tmp_path / "whole")}), tokenizer)
    assert len(digests(tmp_path / "small")) == 7
    assert len(digests(tmp_path / "whole")) == 1
    assert [example.input_ids.tolist() for example in small.train] == [e.input_ids.tolist() for e in whole.train]
    assert small.report.datasets == whole.report.datasets


def test_a_renamed_file_and_set_are_found_and_called_by_their_new_names(
    chatml: Make, tokenizer: Any, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = rows(200)
    listed[3]["output"] = ""
    prepare(chatml(listed), tokenizer)
    monkeypatch.setattr(tokenised, "encode_shard", None)
    (tmp_path / "rows.json").rename(tmp_path / "better.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"new": {"file_name": "better.json"}}))
    data = DataConfig(dataset=("new",), dataset_dir=str(tmp_path), template="chatml")
    prepared = prepare(data, tokenizer, output_dir=tmp_path / "out")
    assert [prepared.train.origin(place) for place in (0, 3, 198)] == [
        "better.json#1",
        "better.json#5",
        "better.json#200",
    ]
    [lost] = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert (lost["dataset"], lost["origin"]) == ("new", "better.json#4")


def start_child(tmp_path: Path, tokenizer: Any, into: str, seconds: float) -> subprocess.Popen[str]:
    file = tmp_path / "tokenizer.json"
    if not file.exists():
        tokenizer.backend_tokenizer.save(str(file))
    words = [sys.executable, "-c", CHILD, str(file), str(tmp_path), str(tmp_path / into), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "RANK": "0"})


def test_after_a_kill_the_rest_is_made_and_every_byte_is_the_same(
    chatml: Make, tokenizer: Any, tmp_path: Path
) -> None:
    chatml(rows(60))
    whole = start_child(tmp_path, tokenizer, "whole", 0)
    assert whole.communicate()[0].count("shard") == 8
    child = start_child(tmp_path, tokenizer, "killed", 0.5)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    sealed = len(digests(tmp_path / "killed"))
    assert 2 <= sealed <= 3
    (tmp_path / "killed" / "train-rows" / ".000004.safetensors.1").write_bytes(b"half")
    again = start_child(tmp_path, tokenizer, "killed", 0)
    assert again.communicate()[0].count("shard") == 8 - sealed
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*.safetensors.*"))


def test_two_processes_at_once_make_each_shard_once(chatml: Make, tokenizer: Any, tmp_path: Path) -> None:
    chatml(rows(40))
    children = [start_child(tmp_path, tokenizer, "both", 0.1) for _ in range(2)]
    said = [child.communicate()[0].count("shard") for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum(said) == 5
    assert len(digests(tmp_path / "both")) == 5


def test_a_damaged_shard_is_made_again_and_the_others_are_not(
    chatml: Make, tokenizer: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = chatml(rows(40))
    before = prepare(data, tokenizer)
    whole = digests(own_cache)
    path = sorted(own_cache.rglob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    made: list[int] = []
    encode_shard = tokenised.encode_shard
    monkeypatch.setattr(tokenised, "encode_shard", lambda *args: made.append(1) or encode_shard(*args))
    after = prepare(data, tokenizer)
    assert "checksum" in capsys.readouterr().err
    assert made == [1]
    assert digests(own_cache) == whole
    assert after.report == before.report


def test_overwrite_cache_makes_all_of_it_again(
    chatml: Make, tokenizer: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = chatml(rows(20))
    prepare(data, tokenizer)
    made: list[int] = []
    encode_shard = tokenised.encode_shard
    monkeypatch.setattr(tokenised, "encode_shard", lambda *args: made.append(1) or encode_shard(*args))
    prepare(data, tokenizer)
    assert made == []
    prepare(data.model_copy(update={"overwrite_cache": True}), tokenizer)
    assert len(made) == 3


def test_a_named_folder_is_checked(chatml: Make, tokenizer: Any, tmp_path: Path) -> None:
    data = chatml(rows(20), cutoff_len=64, tokenized_path=str(tmp_path / "kept"))
    first = prepare(data, tokenizer)
    assert prepare(data, tokenizer).report == first.report
    with pytest.raises(
        DataError, match=r"tokenised otherwise(?s:.*)cutoff_len: 64 there, 32 now(?s:.*)overwrite_cache"
    ):
        prepare(data.model_copy(update={"cutoff_len": 32}), tokenizer)
    with pytest.raises(DataError, match=r"found: +rows: \w+ there, \w+ now\n +expected"):
        prepare(chatml(rows(21), cutoff_len=64, tokenized_path=str(tmp_path / "kept")), tokenizer)
    made = prepare(data.model_copy(update={"cutoff_len": 32, "overwrite_cache": True}), tokenizer)
    assert made.report.datasets[0].num_tokens <= first.report.datasets[0].num_tokens


def test_a_named_folder_needs_no_rows(chatml: Make, tokenizer: Any, tmp_path: Path) -> None:
    data = chatml(rows(20), eval_dataset=("rows",), tokenized_path=str(tmp_path / "kept"))
    first = prepare(data, tokenizer)
    alone = DataConfig(tokenized_path=str(tmp_path / "kept"), template="chatml")
    again = prepare(alone, tokenizer)
    assert again.report == first.report
    assert np.array_equal(again.train[7].input_ids, first.train[7].input_ids)
    with pytest.raises(DataError, match=r"template: chatml \(\w+\) there, llama2"):
        prepare(alone.model_copy(update={"template": "llama2"}), tokenizer)


def test_a_folder_with_other_files_is_left_alone(chatml: Make, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="holds other files"):
        prepare(chatml(rows(2), tokenized_path=str(tmp_path / "other")), tokenizer)


def test_a_folder_that_another_process_has_just_made_is_shared(chatml: Make, tokenizer: Any, tmp_path: Path) -> None:
    """Two ranks begin at once: one has made its folder, and not yet the lock in it."""
    data = chatml(rows(2), tokenized_path=str(tmp_path / "kept"))
    first = prepare(data, tokenizer)
    (made,) = (tmp_path / "kept").iterdir()
    shutil.rmtree(made)
    made.mkdir()
    assert prepare(data, tokenizer).report == first.report


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(
    chatml: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLAMAFACTORY_TOKEN_CACHE", str(tmp_path / "file" / "tokens"))
    with pytest.raises(DataError, match=r"tokenised rows cannot be written(?s:.*)set cache_dir"):
        prepare(chatml(rows(2)), tokenizer)


def test_work_that_stops_leaves_no_manifest(chatml: Make, tokenizer: Any, own_cache: Path) -> None:
    listed = rows(30)
    listed[20]["output"] = "word " * 200
    with pytest.raises(DataError, match="longer than cutoff_len"):
        prepare(chatml(listed, cutoff_len=64, overlong="error"), tokenizer)
    assert len(list(own_cache.rglob("*.safetensors"))) == 2
    assert not list(own_cache.rglob("manifest.json"))


def test_wrong_looked_up_words_cost_nothing_but_time(
    chatml: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards and data sets that were made before the difference was seen are made again; the warning comes once."""
    first, second = rows(20), rows(40)
    first[2]["output"] = second[3]["output"] = "zebra"  # too short to be the text that is compared
    second[30]["output"] = "zebra " * 50
    data = chatml(second, cutoff_len=64)
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"first": {"file_name": "first.json"}, "rows": {"file_name": "rows.json"}})
    )
    data = data.model_copy(update={"dataset": ("first", "rows")})
    right = prepare(data.model_copy(update={"tokenized_path": str(tmp_path / "right")}), tokenizer)
    real = WordEncoder._learn

    def learn(self: WordEncoder, parts: Any) -> Any:
        seldom = real(self, parts)
        for part in ("zebra", " zebra"):
            if part in self._ids:
                self._ids[part] = b"\1\0\0\0"
        return seldom

    monkeypatch.setattr(WordEncoder, "_learn", learn)
    capsys.readouterr()
    found = prepare(data.model_copy(update={"tokenized_path": str(tmp_path / "found")}), tokenizer)
    said = capsys.readouterr().err
    assert said.count("differ from those of the tokenizer") == 1
    assert [example.input_ids.tolist() for example in found.train] == [one.input_ids.tolist() for one in right.train]
    assert digests(tmp_path / "found") == digests(tmp_path / "right")
    assert found.report == right.report
