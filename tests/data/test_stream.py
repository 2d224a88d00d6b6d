from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.pipeline import PreparedData
from llamafactory.data.stream import ExampleStream, files_digest
from llamafactory.data.stream_pipeline import prepare_stream
from llamafactory.data.template_choice import build_template
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


def write(file: Path, count: int, *, broken: tuple[int, ...] = ()) -> str:
    rows = [{"instruction": f"Question {number}?", "output": f"Answer {number}."} for number in range(count)]
    lines = ["{" if number in broken else json.dumps(row) for number, row in enumerate(rows)]
    file.write_text("\n".join(lines))
    return str(file)


def opened(tokenizer: Any, *names: str, output_dir: Path | None = None, **options: Any) -> PreparedData:
    config = DataConfig(dataset=names, streaming=True, **{"buffer_size": 8, **options})
    template = build_template("chatml", tokenizer)
    return prepare_stream(config, template, tokenizer, seed=5, output_dir=output_dir)


def stream_of(prepared: PreparedData) -> ExampleStream:
    assert prepared.stream is not None
    return prepared.stream


def test_any_step_is_the_same_however_it_is_reached(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 30)
    whole = stream_of(opened(tokenizer, file))
    windows = [whole.window(first, 4) for first in range(0, 80, 4)]  # more than two epochs
    epoch = [origin for window in windows for origin in window.origins][:30]
    assert sorted(epoch, key=lambda origin: int(origin.split(":")[1])) == [f"a.jsonl:{n}" for n in range(1, 31)]
    resumed = stream_of(opened(tokenizer, file))
    before = resumed.num_encoded
    later = resumed.window(60, 4)
    assert resumed.num_encoded - before == 4  # what was passed over was not tokenised
    assert later.origins == windows[15].origins
    pairs = zip(later.table, windows[15].table, strict=True)
    assert all((one.input_ids == other.input_ids).all() and (one.labels == other.labels).all() for one, other in pairs)
    assert resumed.window(4, 4).origins == windows[1].origins  # back again


def test_data_sets_are_mixed_and_rows_held_out_are_never_trained(tokenizer: Any, tmp_path: Path) -> None:
    names = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 10)
    prepared = opened(tokenizer, *names, mix_strategy="interleave_over", val_size=3)
    assert len(prepared.evaluation["eval"]) == 3
    origins = stream_of(prepared).window(0, 36).origins
    assert not {"a.jsonl:1", "a.jsonl:2", "b.jsonl:1"} & set(origins)
    assert sum(origin.startswith("a") for origin in origins) == 18


def test_bad_rows_are_counted_once_and_written(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", 20, broken=(3, 7))
    stream = stream_of(opened(tokenizer, file, output_dir=tmp_path / "out", max_bad_rows=0.2, buffer_size=1))
    windows = [stream.window(first, 5) for first in range(0, 20, 5)]
    assert sum(len(window.table) for window in windows) == 18
    stream.window(0, 5)  # read again, not counted again
    lines = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines] == ["a.jsonl:4", "a.jsonl:8"]
    assert "the line is not JSON (1)" in capsys.readouterr().err


def test_too_many_bad_rows_stop(tokenizer: Any, tmp_path: Path) -> None:
    stream = stream_of(opened(tokenizer, write(tmp_path / "a.jsonl", 40, broken=tuple(range(10, 20))), buffer_size=1))
    stream.window(0, 10)
    with pytest.raises(DataError, match=r"of the first 20 rows cannot be used(?s:.*)the line is not JSON(?s:.*)1\.0%"):
        stream.window(10, 10)


def test_memory_is_that_of_the_buffer(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    row = json.dumps({"instruction": "q" * 500, "output": "a" * 1500})
    with file.open("w") as out:
        out.writelines(row + "\n" for _ in range(10_000))
    stream = stream_of(opened(tokenizer, str(file), buffer_size=50, max_bad_rows=0))
    tracemalloc.start()
    stream.window(9_000, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 < file.stat().st_size


def test_nothing_usable_is_said_before_training(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the first rows"):
        opened(tokenizer, write(tmp_path / "a.jsonl", 5), cutoff_len=8, overlong="drop")


def test_rows_of_the_same_length_are_other_rows(tokenizer: Any, tmp_path: Path) -> None:
    file = Path(write(tmp_path / "a.jsonl", 30))
    before, facts = opened(tokenizer, str(file)).report.fingerprint, file.stat()
    content = file.read_bytes()
    file.write_bytes(content.replace(b"Question 15?", b"Question 51?"))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert opened(tokenizer, str(file)).report.fingerprint != before
    file.write_bytes(content)
    os.utime(file, (1, 1))  # a copy of a small file is the same file
    assert opened(tokenizer, str(file)).report.fingerprint == before


@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_change_of_a_large_file_is_seen(tmp_path: Path, place: int) -> None:
    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * 1000)
    os.utime(file, (1, 1))
    before = files_digest([file], most_bytes=999, end_bytes=10)
    assert files_digest([file], most_bytes=999, end_bytes=10) == before
    file.write_bytes(b"x" * place + b"y" + b"x" * (999 - place))
    if place != 500:  # in the middle the time tells, at the ends the bytes do
        os.utime(file, (1, 1))
    assert files_digest([file], most_bytes=999, end_bytes=10) != before
