from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.sources import SourceRow, list_files, read_source
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError

ROWS = [{"a": "x", "b": "ü"}, {"a": "line\nbreak", "b": ""}]


def read(location: Path) -> list[SourceRow]:
    return list(read_source(DatasetSpec(name="rows", source="file", location=str(location))))


def write_json(file: Path) -> None:
    file.write_text(json.dumps(ROWS))


def write_jsonl(file: Path) -> None:
    file.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\r\n\r\n"
    )


def write_csv(file: Path) -> None:
    file.write_bytes('a,b\r\nx,ü\r\n"line\nbreak",\r\n'.encode("utf-8-sig"))


def write_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), file)


def write_arrow_file(file: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(file: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("ending", "write", "origins"),
    [
        (".json", write_json, ["rows.json#1", "rows.json#2"]),
        (".jsonl", write_jsonl, ["rows.jsonl:1", "rows.jsonl:2"]),
        (".csv", write_csv, ["rows.csv:2", "rows.csv:4"]),
        (".parquet", write_parquet, ["rows.parquet#1", "rows.parquet#2"]),
        (".arrow", write_arrow_file, ["rows.arrow#1", "rows.arrow#2"]),
        (".arrow", write_arrow_stream, ["rows.arrow#1", "rows.arrow#2"]),
    ],
)
def test_the_same_rows_from_every_file_type(tmp_path: Path, ending: str, write: Any, origins: list[str]) -> None:
    file = tmp_path / f"rows{ending}"
    write(file)
    rows = read(file)
    assert [row.values for row in rows] == ROWS
    assert [row.origin for row in rows] == origins
    assert all(row.fault is None for row in rows)


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(b"one\r\n\r\ntwo\n")
    assert [(row.origin, row.values) for row in read(file)] == [
        ("rows.txt:1", {"text": "one"}),
        ("rows.txt:3", {"text": "two"}),
    ]


def test_a_wrong_ending_between_json_and_jsonl_does_no_harm(tmp_path: Path) -> None:
    lines, array = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS))
    write_json(array)
    assert [row.values for row in read(lines)] == [row.values for row in read(array)] == ROWS


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", ".hidden"):
        write_json(tmp_path / name)
    assert [row.origin for row in read(tmp_path)] == ["a.json#1", "a.json#2", "b.json#1", "b.json#2"]
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match=r"several types(?s:.*)\.json, \.txt"):
        list_files(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder has no files"):
        list_files(tmp_path)


def test_a_broken_line_is_a_fault_and_the_others_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": }\n[1]\n{"a": 1, "a": 2}\n{"a": 3}')
    rows = read(file)
    assert [row.fault.reason if row.fault else "" for row in rows] == [
        "",
        "the line is not JSON",
        "the row is not an object",
        "a repeated key",
        "",
    ]


def test_deep_nesting_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": ' + "[" * 200_000)
    [row] = read(file)
    assert row.fault is not None


def test_the_hub_is_asked_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> list[dict[str, str]]:
        asked.update(options, path=path)
        return [{"a": "b"}]

    spec = DatasetSpec(name="x", source="hub", location="user/data", subset="en", split="test")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [(row.origin, row.values) for row in read_source(spec)] == [("x#1", {"a": "b"})]
    assert asked == {"path": "user/data", "name": "en", "data_dir": None, "split": "test", "streaming": False}

    def fail(path: str, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"x \(user/data\)(?s:.*)ConnectionError: no network"):
        list(read_source(spec))
