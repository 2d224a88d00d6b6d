from __future__ import annotations

import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.sources import json_file
from llamafactory.data.sources.json_file import read_json, read_jsonl
from llamafactory.data.sources.row import SourceFile
from llamafactory.extras.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), min_size=1, max_size=5)


def held(raw: bytes) -> SourceFile:
    return SourceFile(name="rows.json", where="rows.json", open=lambda: io.BytesIO(raw))


@pytest.fixture(params=[1, 3, 7, 1 << 20], ids="chunks of {} bytes".format)
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunk")
@given(rows=ROWS, indent=st.sampled_from([None, 0, 2]), is_ascii=st.booleans(), mark=st.booleans())
def test_a_list_is_read_as_json_reads_it(rows: Any, indent: int | None, is_ascii: bool, mark: bool) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    raw = text.encode("utf-8-sig" if mark else "utf-8", "surrogatepass")
    assert [dict(row.values) for row in read_json(held(raw))] == json.loads(text)


@pytest.mark.usefixtures("_chunk")
@given(rows=ROWS, place=st.integers(0, 200), wrong=st.sampled_from(["", "}", "#", "\n", '"', "]", ",", "\n\n@"]))
def test_a_broken_list_stops_where_json_stops(rows: Any, place: int, wrong: str) -> None:
    text = json.dumps(rows, indent=1)
    place = 1 + place % (len(text) - 1)
    text = text[:place] + wrong + text[place + (not wrong) :]
    problem = ""
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        expected = []
        problem = f"(line {error.lineno}, column {error.colno})"
        if "trailing comma" in error.msg:  # Python 3.13 points to the comma, earlier ones behind it
            problem = "not valid JSON"
    if problem:
        with pytest.raises(DataError, match=re.escape(problem)):
            list(read_json(held(text.encode())))
    else:
        found = list(read_json(held(text.encode())))
        assert [row.fault is None for row in found] == [isinstance(row, dict) for row in expected]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"
    row = json.dumps({"instruction": "x" * 1000, "output": "y" * 1000})
    with file.open("w") as out:
        out.write("[\n" if kind == "json" else "")
        for number in range(8000):
            out.write(row + (",\n" if kind == "json" and number < 7999 else "\n"))
        out.write("]" if kind == "json" else "")
    assert file.stat().st_size > 16e6
    tracemalloc.start()
    read = read_json if kind == "json" else read_jsonl
    assert sum(1 for _ in read(SourceFile.at(file))) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_wrong_byte_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", 4)
    with pytest.raises(DataError, match="byte 0xff in line 3"):
        list(read_json(held(b'[\n{"a": "b"},\n{"a": "\xff"}]')))


def test_rows_before_a_broken_one_come_out() -> None:
    rows = read_json(held(b'[{"a": 1}, {"a": }]'))
    assert next(rows).values == {"a": 1}
    with pytest.raises(DataError, match=r"rows\.json:1: the file is not valid JSON"):
        next(rows)
