"""The rows of a stream from any place on, whatever the file type, the mix and the buffer."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamafactory.data.sources import Place, read_places, read_source
from llamafactory.data.stream_rows import StreamOptions, StreamRows
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError

TEXTS = ["plain", 'quotes " and, commas', "two\nlines", "ünïcödé 🙂", "", "x" * 300]


def write(folder: Path, kind: str, count: int, name: str = "rows") -> Path:
    """Rows of one file type, with blank lines, marks and values over several lines where the type has them."""
    file = folder / f"{name}.{kind}"
    rows = [{"text": f"{name} {number} {TEXTS[number % len(TEXTS)]}"} for number in range(count)]
    if kind == "jsonl":
        file.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    elif kind == "json":
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    elif kind == "txt":
        file.write_text("".join(row["text"].replace("\n", " ") + "\r\n" for row in rows), newline="")
    elif kind == "csv":
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
        file.write_text("text\n" + "\n".join(quoted) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as out:
            for batch in pa.Table.from_pylist(rows).to_batches(max_chunksize=6):
                out.write_batch(batch)
    return file


def spec_of(location: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(name=location.stem, source="file", location=str(location), **options)


def options_of(**changes: Any) -> StreamOptions:
    known: dict[str, Any] = {
        "strategy": "concat", "probs": None, "buffer_size": 8, "seed": 3, "max_samples": None, "num_held_out": (0,),
        "max_bad_rows": 1.0, "variables": {},
    }  # fmt: skip
    return StreamOptions(**known | changes)


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "csv", "parquet", "arrow"])
def test_reading_begins_at_any_row_of_a_folder(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder, kind, 20, name)
    spec = spec_of(folder)
    rows = list(read_source(spec))
    assert len(rows) == 40
    for number, row in enumerate(rows):
        assert row.place is not None
        assert list(read_source(spec, row.place, number)) == rows[number:]
    chosen = random.Random(1).choices(rows, k=15)
    found = read_places(spec, [row.place for row in chosen if row.place])
    assert [found[row.place] for row in chosen if row.place] == chosen
    with pytest.raises(DataError, match="no longer where it was|not valid JSON"):
        read_places(spec, [Place(1, 99, 10**6)])
    part = spec_of(folder, split="train[10%:80%]")
    rows = list(read_source(part))
    for number, row in enumerate(rows):
        assert list(read_source(part, row.place, number)) == rows[number:]


def test_a_broken_list_names_its_line_also_where_reading_began_inside(tmp_path: Path) -> None:
    file = write(tmp_path, "json", 10)
    file.write_text(file.read_text().replace("rows 8 ", '" rows 8'))
    rows = []
    with pytest.raises(DataError) as whole:
        rows += read_source(spec_of(file))
    [*_, last] = islice(read_source(spec_of(file)), 6)
    with pytest.raises(DataError) as inside:
        list(read_source(spec_of(file), last.place, 5))
    assert str(inside.value) == str(whole.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "json", "parquet"]), buffer=st.integers(1, 50))
def test_a_run_that_is_killed_anywhere_reads_the_same_rows(
    data: st.DataObject, kind: str, buffer: int, tmp_path: Path
) -> None:
    sizes = data.draw(st.lists(st.integers(3, 40), min_size=1, max_size=3))
    specs = [spec_of(write(tmp_path, kind, size, f"{size}-{place}")) for place, size in enumerate(sizes)]
    options = options_of(
        strategy=data.draw(st.sampled_from(["concat", "interleave_under", "interleave_over", "interleave_once"])),
        probs=data.draw(st.none() | st.lists(st.floats(0.2, 3), min_size=len(sizes), max_size=len(sizes)).map(tuple)),
        buffer_size=buffer,
        num_held_out=(data.draw(st.integers(0, 2)),) * len(sizes),
        max_samples=data.draw(st.none() | st.integers(3, 40)),
    )
    expected = [row.origin for _, row in islice(StreamRows(specs, options), 150)]  # some epochs
    rows, seen = StreamRows(specs, options), []
    for length in data.draw(st.lists(st.integers(0, 60), max_size=4)):  # killed and continued, again and again
        seen += [row.origin for _, row in islice(rows, length)]
        state = json.loads(json.dumps(rows.state_of(rows.mark())))
        assert sum(state["drawn"].values()) == len(seen)
        rows = StreamRows(specs, options)
        rows.seek(state)
    seen += [row.origin for _, row in islice(rows, max(0, 150 - len(seen)))]
    assert seen[:150] == expected


def test_nothing_before_the_place_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.data.sources import json_file

    file = write(tmp_path, "jsonl", 5000)
    options = options_of(buffer_size=20)
    rows = StreamRows([spec_of(file)], options)
    for _ in range(4500):
        next(rows)
    state = rows.state_of(rows.mark())
    expected = [row.origin for _, row in islice(rows, 50)]
    read: list[str] = []
    original = json_file._read_line  # pyright: ignore[reportPrivateUsage]

    def counted(line: str, origin: str, place: Place) -> Any:
        read.append(origin)
        return original(line, origin, place)

    monkeypatch.setattr(json_file, "_read_line", counted)
    resumed = StreamRows([spec_of(file)], options)
    resumed.seek(state)
    assert [row.origin for _, row in islice(resumed, 50)] == expected
    assert len(read) < 500


def test_other_files_are_passed_over_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "jsonl", 30)
    rows = StreamRows([spec_of(file)], options_of())
    list(islice(rows, 40))
    state = rows.state_of(rows.mark())
    with file.open("a") as out:
        out.write('\n{"text": "one more"}\n')
    resumed = StreamRows([spec_of(file)], options_of())
    resumed.seek(state)
    assert "10 rows of this epoch are passed over" in capsys.readouterr().err
    again = StreamRows([spec_of(file)], options_of())
    expected = [row.origin for _, row in islice(again, 45)]
    assert [row.origin for _, row in islice(resumed, 4)] == expected[41:45]


@pytest.mark.parametrize("changes", [{"probs": (0.5, 0.5)}, {"strategy": "concat"}, {"buffer_size": 3}, {"seed": 4}])
def test_a_place_in_another_order_is_passed_over_to(changes: dict[str, Any], tmp_path: Path) -> None:
    specs = [spec_of(write(tmp_path, "jsonl", 20, name)) for name in ("a", "b")]
    before = StreamRows(specs, options_of(strategy="interleave_over", num_held_out=(0, 0)))
    list(islice(before, 11))
    options = options_of(**{"strategy": "interleave_over", "num_held_out": (0, 0)} | changes)
    expected, found = StreamRows(specs, options), StreamRows(specs, options)
    found.seek(before.state_of(before.mark()))
    assert list(islice(found, 15)) == list(islice(expected, 11, 26))
