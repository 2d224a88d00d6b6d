from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.registry import check_datasets, find_spec, read_info, spec_from_entry
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


def test_an_entry_gets_the_defaults_of_its_format() -> None:
    spec = spec_from_entry("x", {"file_name": "x.json"}, "folder")
    assert (spec.source, spec.location, spec.formatting) == ("file", str(Path("folder/x.json")), "alpaca")
    assert (spec.is_ranking, spec.split, spec.num_samples) == (False, "train", None)
    assert spec.columns == {"prompt": "instruction", "query": "input", "response": "output"}
    sharegpt = spec_from_entry("x", {"file_name": "x.json", "formatting": "sharegpt"}, "folder")
    assert sharegpt.columns == {"messages": "conversations"}
    assert sharegpt.tags["observation_tag"] == "observation"


def test_a_block_replaces_all_defaults_of_its_kind() -> None:
    entry = {
        "file_name": "x.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    spec = spec_from_entry("x", entry, "folder")
    assert spec.columns == {"messages": "chat"}
    assert spec.tags.get("system_tag") is None
    alpaca = spec_from_entry("x", {"file_name": "x.json", "columns": {"prompt": "q"}}, "folder")
    assert alpaca.columns.get("response") is None


def test_the_hub_comes_before_a_file() -> None:
    spec = spec_from_entry(
        "x", {"hf_hub_url": "user/data", "file_name": "x.json", "subset": "en", "split": "test"}, "d"
    )
    assert (spec.source, spec.location, spec.subset, spec.split) == ("hub", "user/data", "en", "test")


@pytest.mark.parametrize("key", ["ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"])
def test_sources_that_are_not_implemented_say_so(key: str) -> None:
    with pytest.raises(DataError, match=f"'{key}' is not implemented(?s:.*)file_name or hf_hub_url"):
        spec_from_entry("x", {key: "a/b", "file_name": "x.json"}, "d")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "names no place to load from"),
        ("x.json", "the entry is not an object"),
        ({"file_name": 3}, "'file_name' has the wrong type"),
        ({"file_name": "x", "num_samples": True}, "'num_samples' has the wrong type"),
        ({"file_name": "x", "columns": {"prompt": 3}}, "'prompt' has the wrong type"),
        ({"file_name": "x", "tags": {"user": "u"}}, "unknown key 'user'"),
    ],
)
def test_wrong_entries(entry: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        spec_from_entry("x", entry, "d")


def test_every_entry_of_the_reference_data_is_read(shared_dir: Path) -> None:
    folder = str(shared_dir / "data")
    assert all(find_spec(name, folder).source == "file" for name in read_info(folder))


def test_a_dict_stands_for_the_file_and_online_for_the_hub() -> None:
    assert find_spec("x", {"x": {"file_name": "y.json"}}).location == "y.json"
    assert find_spec("user/data", "ONLINE").source == "hub"
    with pytest.raises(DataError, match="remote dataset_info"):
        find_spec("x", "REMOTE:user/repo")


def test_a_broken_registry_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "dataset_info.json"
    file.write_text('{"a": {"file_name": "a.json"},\n}')
    with pytest.raises(DataError, match=r"dataset_info\.json:(?s:.*)not valid JSON"):
        find_spec("a", str(tmp_path))
    file.write_text("[]")
    with pytest.raises(DataError, match="not an object at the top level"):
        find_spec("a", str(tmp_path))
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"ü": {"file_name": "a.json"}}, ensure_ascii=False).encode())
    assert find_spec("ü", str(tmp_path)).name == "ü"


@pytest.mark.parametrize(
    ("row", "formatting", "columns"),
    [
        (
            {"instruction": "a", "output": "b"},
            "alpaca",
            {"prompt": "instruction", "query": "input", "response": "output"},
        ),
        ({"prompt": "a", "completion": "b"}, "alpaca", {"prompt": "prompt", "response": "completion"}),
        ({"text": "a"}, "alpaca", {"prompt": "text"}),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", {"messages": "conversations"}),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": []},
            "openai",
            {"messages": "messages", "tools": "tools"},
        ),
    ],
)
def test_the_format_of_a_bare_file_is_detected(tmp_path: Path, row: Any, formatting: str, columns: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    spec = find_spec(str(file), str(tmp_path))
    assert (spec.name, spec.formatting, spec.columns) == ("rows", formatting, columns)


def test_a_bare_file_of_no_known_format(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"foo": 1}')
    with pytest.raises(DataError, match=r"no known format fits(?s:.*)the columns foo(?s:.*)alpaca"):
        find_spec(str(file), str(tmp_path))


def test_all_problems_with_names_come_at_once(tmp_path: Path) -> None:
    info = {"identity": {"file_name": "identity.json"}, "gone": {"file_name": "gone.json"}, "odd": {"file": "x"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "identity.json").write_text("[]")
    data = DataConfig(dataset=("identiy", "gone", "identity"), eval_dataset=("odd",), dataset_dir=str(tmp_path))
    problems = check_datasets(data)
    assert [(problem.key, problem.given) for problem in problems] == [
        ("dataset", "identiy"),
        ("dataset", "gone"),
        ("eval_dataset", "odd"),
    ]
    assert problems[0].message == "unknown data set 'identiy'"
    assert problems[0].fix is not None
    assert "did you mean 'identity'?" in problems[0].fix
    assert "no such file or folder" in problems[1].message
    assert "unknown key 'file'" in problems[2].message


def test_a_missing_registry_is_one_problem(tmp_path: Path) -> None:
    problems = check_datasets(DataConfig(dataset=("a", "b"), dataset_dir=str(tmp_path / "nowhere")))
    assert [problem.message for problem in problems] == [
        f"{tmp_path / 'nowhere'}: no dataset_info.json (no such folder)"
    ]


def test_checking_names_needs_no_heavy_package() -> None:
    code = (
        "import sys, llamafactory.data.registry, llamafactory.data.chat_template, llamafactory.data.render;"
        "heavy = ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'jinja2');"
        "print([name for name in heavy if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
