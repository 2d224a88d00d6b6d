from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data import registry_entry
from llamafactory.data.registry import check_datasets, find_spec, read_info
from llamafactory.data.registry_entry import spec_from_entry
from llamafactory.data.sources import cloud, hub
from llamafactory.data.types import SourceAccess
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


def test_a_script_comes_before_a_file_and_is_never_run() -> None:
    with pytest.raises(DataError, match=r"'script_url' is not used(?s:.*)foreign code(?s:.*)save its rows as \.jsonl"):
        spec_from_entry("x", {"script_url": "a", "cloud_file_name": "s3://a/b", "file_name": "x.json"}, "d")


def test_the_cloud_comes_before_a_file() -> None:
    spec = spec_from_entry("x", {"cloud_file_name": "s3://a/b.json", "file_name": "x.json"}, "d")
    assert (spec.source, spec.location) == ("cloud", "s3://a/b.json")
    with pytest.raises(DataError, match="not an address in the cloud(?s:.*)s3://BUCKET/FILE"):
        spec_from_entry("x", {"cloud_file_name": "https://a/b.json"}, "d")


@pytest.mark.parametrize(
    ("entry", "switch", "expected"),
    [
        ({"hf_hub_url": "h", "ms_hub_url": "m", "om_hub_url": "o"}, "", ("hub", "h")),
        ({"hf_hub_url": "h", "ms_hub_url": "m", "om_hub_url": "o"}, "USE_MODELSCOPE_HUB", ("modelscope", "m")),
        ({"hf_hub_url": "h", "ms_hub_url": "m", "om_hub_url": "o"}, "USE_OPENMIND_HUB", ("openmind", "o")),
        ({"ms_hub_url": "m", "file_name": "f"}, "", ("modelscope", "m")),
        ({"om_hub_url": "o", "file_name": "f"}, "USE_MODELSCOPE_HUB", ("openmind", "o")),
        ({"hf_hub_url": "h", "file_name": "f"}, "USE_MODELSCOPE_HUB", ("hub", "h")),
    ],
)
def test_which_of_several_hubs(monkeypatch: pytest.MonkeyPatch, entry: Any, switch: str, expected: Any) -> None:
    monkeypatch.setattr(registry_entry, "check_hub", lambda source, where: None)  # whatever is installed here
    if switch:
        monkeypatch.setenv(switch, "1")
    spec = spec_from_entry("x", entry, "d")
    assert (spec.source, spec.location) == expected


@pytest.mark.parametrize(("key", "extra"), [("ms_hub_url", "modelscope"), ("om_hub_url", "openmind")])
def test_a_hub_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch, key: str, extra: str) -> None:
    monkeypatch.setattr(hub, "is_installed", lambda name: False)
    with pytest.raises(DataError, match=rf'need the package(?s:.*)pip install "llamafactory\[{extra}\]"'):
        spec_from_entry("x", {key: "a/b"}, "d")


def test_offline_data_sets_lie_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_installed", lambda name: True)
    monkeypatch.setattr(cloud, "is_installed", lambda name: True)
    offline = SourceAccess(is_offline=True)
    for entry in ({"ms_hub_url": "a/b"}, {"om_hub_url": "a/b"}, {"cloud_file_name": "s3://a/b.json"}):
        assert spec_from_entry("x", entry, "d").location in entry.values()
        with pytest.raises(DataError, match="offline is on, and this data set is read over the network"):
            spec_from_entry("x", entry, "d", offline)
    assert spec_from_entry("x", {"hf_hub_url": "a/b"}, "d", offline).source == "hub"  # it may be in the cache
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
    with pytest.raises(DataError, match="dataset_dir: ONLINE: offline is on"):
        find_spec("user/data", "ONLINE", offline)


def test_paths_in_rows_begin_in_media_dir_or_beside_the_registry() -> None:
    assert spec_from_entry("x", {"file_name": "x.json"}, "d").media_dir == "d"
    assert spec_from_entry("x", {"file_name": "x.json"}, "d", SourceAccess(media_dir="m")).media_dir == "m"
    assert spec_from_entry("x", {"hf_hub_url": "a/b"}, "d").media_dir is None


def test_only_hubs_have_other_splits_subsets_and_folders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"files have no such split(?s:.*)train\[:100\]"):
        spec_from_entry("x", {"file_name": "x.json", "split": "test"}, "d")
    spec_from_entry("x", {"file_name": "x.json", "subset": "en"}, "d")
    assert "'subset' has no effect" in capsys.readouterr().err


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


def test_online_means_the_hub_that_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
    assert find_spec("user/data", "ONLINE").source == "modelscope"


def test_a_remote_registry_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[Any] = []
    info = {
        "a": {"hf_hub_url": "user/data", "columns": {"prompt": "q", "response": "r"}},
        "b": {"file_name": "b.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file, options))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    access = SourceAccess(cache_dir="cache", hf_token="secret")
    spec = find_spec("a", "REMOTE:user/registry", access)
    assert (spec.source, spec.location, spec.columns) == ("hub", "user/data", {"prompt": "q", "response": "r"})
    options = {"repo_type": "dataset", "cache_dir": "cache", "token": "secret", "local_files_only": False}
    assert asked == [("user/registry", "dataset_info.json", options)]
    find_spec("a", "REMOTE:user/registry", SourceAccess(is_offline=True))
    assert asked[1][2]["local_files_only"]
    assert "secret" not in repr(spec)
    with pytest.raises(DataError, match=r"a file on another machine(?s:.*)b\.json in REMOTE:user/registry"):
        find_spec("b", "REMOTE:user/registry")
    with pytest.raises(DataError, match=r"unknown data set 'c'(?s:.*)in REMOTE:user/registry(?s:.*)one of: a, b"):
        find_spec("c", "REMOTE:user/registry")


def test_a_remote_registry_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*words: Any, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"REMOTE:user/repo: dataset_info(?s:.*)no network(?s:.*)dataset_dir"):
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


ASKED = {"prompt": "prompt", "response": "completion"}
BOTH: dict[str, Any] = {"chosen": {}, "rejected": {}}
SIDES = {"chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("row", "formatting", "columns"),
    [
        (
            {"instruction": "a", "chosen": "b", "rejected": "c"},
            "alpaca",
            {"prompt": "instruction", "query": "input"},
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "alpaca", {"prompt": "prompt"}),
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}},
            "sharegpt",
            {"messages": "conversations"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "chosen": {}, "rejected": {}},
            "openai",
            {"messages": "messages"},
        ),
    ],
)
def test_pairs_of_answers_are_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, formatting: str, columns: Any
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    spec = find_spec(str(file), str(tmp_path))
    assert (spec.formatting, spec.is_ranking, spec.columns) == (formatting, True, {**columns, **SIDES})
    assert f"rows look like '{formatting}' preference pairs" in capsys.readouterr().err


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
        (
            {"messages": [{"role": "assistant", "tool_calls": []}], "images": ["a.png"]},
            "openai",
            {"messages": "messages", "images": "images"},
        ),
        ({"prompt": "a", "completion": "b", "label": True}, "alpaca", {**ASKED, "kto_tag": "label"}),
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
