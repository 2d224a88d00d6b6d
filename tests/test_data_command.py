"""The command `data`: what it prints, its JSON keys, its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamafactory import cli
from llamafactory.commands import data_inputs
from llamafactory.commands.data_help import SUB_COMMANDS
from llamafactory.commands.data_preview import printable
from llamafactory.extras import log

ROWS = [
    {"instruction": "Say hello.", "output": "Hello, \x1b[31mworld\u202e 🙂\nBye"},
    {"instruction": "Count.", "output": "one two three four five six seven eight nine ten " * 4},
    {"instruction": "Say hello.", "output": "Hello, \x1b[31mworld\u202e 🙂\nBye"},
]
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}]}


@pytest.fixture(scope="session")
def tokenizer(embedded_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_dir)


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log, "_said_once", set())


@pytest.fixture
def config(embedded_model_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a config whose data sets are the lists of rows that are given, and gives its path."""

    def make(**datasets: list[Any]) -> str:
        info = {name: {"file_name": f"{name}.json"} for name in datasets}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        for name, rows in datasets.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        lines = [f"model_name_or_path: {embedded_model_dir}", "template: chatml", f"dataset: {','.join(datasets)}"]
        lines += [f"dataset_dir: {tmp_path}", "cutoff_len: 48"]
        (tmp_path / "c.yaml").write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / "c.yaml")

    return make


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `data` with words; gives its exit code and what it printed on both streams."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["data", *words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_the_sub_commands(words: list[str], run: Callable[..., Any]) -> None:
    code, shown, _ = run(*words)
    assert code == 0
    for name in SUB_COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", SUB_COMMANDS)
def test_help_of_each_sub_command(name: str, run: Callable[..., Any]) -> None:
    code, shown, _ = run(name, "--help")
    assert code == 0
    assert shown.startswith(f"llamafactory-cli data {name}: ")
    assert all(word in shown for word, _ in SUB_COMMANDS[name].own_words)
    assert "--json" in shown


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["prevew"], "did you mean 'preview'?"),
        ([], "a sub-command is missing"),
        (["stats", "model_name_or_path=a/b"], "dataset: missing"),
        (["stats", "dataset=nowhere", "model_name_or_path=a/b"], "dataset"),
        (["preview", "--rows", "0", "model_name_or_path=a/b"], "--rows: not a number of rows"),
        (["preview", "--rows"], "--rows: has no value"),
        (["check", "cutof_len=9"], "did you mean 'cutoff_len'?"),
        (["render", "x.jsonl"], "--template: missing"),
        (["render", "--template", "chatml"], "one file is needed"),
        (["render", "--template", "chatlm", "x.jsonl"], "'chatml'"),
        (["render", "--template", "auto", "x.jsonl"], "needs a tokenizer"),
        (["render", "--template", "chatml", "--tokeniser=x", "x.jsonl"], "did you mean '--tokenizer'?"),
    ],
)
def test_wrong_words_give_exit_code_2(words: list[str], fragment: str, run: Callable[..., Any]) -> None:
    code, shown, error = run(*words)
    assert code == 2
    assert shown == ""
    assert fragment in error


def expected_spans(path: str, tokenizer: Any) -> list[str]:
    """The decoded runs of supervised ids of the first row, from the pipeline that training uses."""
    from llamafactory.compose import load_config
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.data.template_choice import build_template

    data = load_config(path, command="data").data
    example = prepare_data(data, build_template("chatml", tokenizer), tokenizer, seed=42).train[0]
    runs: list[list[int]] = []
    before = -100
    for label in example.labels.tolist():
        if label != -100:
            runs = [*runs, [label]] if before == -100 else [*runs[:-1], [*runs[-1], label]]
        before = label
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in runs]


def test_brackets_hold_what_is_supervised(run: Callable[..., Any], config: Any, tokenizer: Any) -> None:
    path = config(a=ROWS)
    code, shown, _ = run("preview", path, "--rows", "1")
    assert code == 0
    assert re.findall("⟦(.*?)⟧", shown, re.DOTALL) == [printable(text) for text in expected_spans(path, tokenizer)]
    assert "\x1b" not in shown
    assert "\\x1b[31mworld\\u202e 🙂" in shown
    assert "── a · a.json#1\n" in shown
    assert "a.json#2" not in shown


def test_colours_hold_what_is_supervised(
    run: Callable[..., Any], config: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = config(a=ROWS)
    _, shown, _ = run("preview", path, "--rows", "1")
    coloured = "".join(re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", shown, re.DOTALL)).replace("↵", "\n")
    assert coloured == "".join(printable(text) for text in expected_spans(path, tokenizer))
    assert "⟦" not in shown


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not data_inputs.has_colour()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert data_inputs.has_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not data_inputs.has_colour()


def test_the_truncation_mark_and_the_ids(run: Callable[..., Any], config: Any, tokenizer: Any) -> None:
    _, shown, _ = run("preview", config(a=ROWS[1:2]), "--ids")
    cut = re.search(r"48 tokens, \d+ supervised, (\d+) cut away", shown)
    assert cut
    assert f"⟧[-{cut[1]}-]" in shown
    lines = re.findall(r"^ +(\d+) +(\d+) ([ +]) (\".*\")$", shown, re.MULTILINE)
    assert [int(line[0]) for line in lines] == list(range(48))
    ids = [int(line[1]) for line in lines]
    assert "".join(json.loads(line[3]) for line in lines) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_preview_as_json(run: Callable[..., Any], config: Any) -> None:
    path = config(a=[*ROWS, {"instruction": "x", "output": 3}])
    _, shown, _ = run("preview", path, "--rows=4", "--json")
    report = json.loads(shown)
    assert set(report) == {"cutoff_len", "template", "rows"}
    assert [row["origin"] for row in report["rows"]] == [f"a.json#{number}" for number in range(1, 5)]
    assert report["rows"][3]["reason"].startswith("a.json#4: output: not a text")
    first = report["rows"][0]
    assert set(first) == {"use", "dataset", "origin", "reason", "num_left_out", "label", "score", "margin", "examples"}
    (example,) = first["examples"]
    assert set(example) == {"spans", "tokens", "num_tokens", "num_supervised", "num_cut", "is_used"}
    assert set(example["spans"][0]) == {"text", "is_supervised", "num_cut_behind"}
    assert example["tokens"] is None
    _, shown, _ = run("preview", path, "--json", "--ids")
    (example,) = json.loads(shown)["rows"][0]["examples"]
    assert set(example["tokens"][0]) == {"id", "text", "is_supervised"}
    assert len(example["tokens"]) == example["num_tokens"]


def test_several_examples_of_one_row_are_said(run: Callable[..., Any], config: Any, embedded_model_dir: Path) -> None:
    from llamafactory.commands.data_preview import render_row
    from llamafactory.data.preview import ShownExample, ShownRow

    one = ShownExample(spans=(), tokens=(), num_tokens=3, num_supervised=1, num_cut=0, is_used=True)
    lines = list(
        render_row(ShownRow(dataset="a", origin="a.json#1", examples=(one, one)), is_coloured=False, has_ids=False)
    )
    assert lines[1] == "one row becomes 2 training sequences, because the template rewrites history"
    assert lines[2] == "sequence 1 of 2: 3 tokens, 1 supervised"


def test_check(run: Callable[..., Any], config: Any) -> None:
    path = config(good=ROWS, bad=[*ROWS, {"instruction": "x", "output": 3}, {"instruction": "y"}])
    code, shown, _ = run("check", path)
    assert code == 1
    assert "good: no problems, 3 of 3 rows can be used\n" in shown
    assert "bad.json:14 (row 4): output: not a text\n    found:    the number 3\n" in shown
    assert "bad.json:18 (row 5): " in shown
    assert shown.endswith("bad: 2 problems, 3 of 5 rows can be used; training would stop\n")
    code, shown, _ = run("check", path, "dataset=good")
    assert (code, shown) == (0, "good: no problems, 3 of 3 rows can be used\n")


def test_check_as_json(run: Callable[..., Any], config: Any) -> None:
    code, shown, _ = run("check", config(bad=[*ROWS, {"instruction": "x", "output": 3}]), "--json", "max_bad_rows=0.5")
    report = json.loads(shown)
    assert (code, report["ok"]) == (1, False)
    (dataset,) = report["datasets"]
    assert set(dataset) == {"use", "name", "num_rows", "num_usable", "problems", "stops_training"}
    assert dataset["stops_training"] is False
    (problem,) = dataset["problems"]
    assert set(problem) == {"dataset", "file", "line", "row", "field", "reason", "found", "expected", "fix"}


def test_stats(run: Callable[..., Any], config: Any) -> None:
    path = config(a=ROWS, b=ROWS[:1])
    code, shown, _ = run("stats", path)
    assert code == 0
    for part in ("a (train)", "rows         3, 3 of them used", "duplicates   1 examples", "over cutoff  1 rows", "█"):
        assert part in shown
    assert re.search(r"^b +25\.0 %", shown, re.MULTILINE)


def test_stats_of_interleaved_sets_say_what_an_epoch_takes(run: Callable[..., Any], config: Any) -> None:
    words = (config(a=ROWS, b=ROWS[:1]), "mix_strategy=interleave_over")
    _, shown, _ = run("stats", *words)
    assert (
        "an epoch (interleave_over)\nmix: a: 50.0%, 3 draws, 1.00 times its rows\nmix: b: 50.0%, 3 draws, 3.00 times"
        in shown
    )
    _, shown, _ = run("stats", *words, "--json")
    assert [one["drawn"] for one in json.loads(shown)["epoch"]] == [3, 3]


def test_an_epoch_of_stats_leaves_out_what_is_held_out_for_evaluation(run: Callable[..., Any], config: Any) -> None:
    words = (config(a=ROWS[:1] * 30, b=ROWS[:1] * 30), "mix_strategy=interleave_once", "val_size=20")
    _, shown, _ = run("stats", *words, "--json")
    assert sum(one["drawn"] for one in json.loads(shown)["epoch"]) == 40


def test_stats_as_json(run: Callable[..., Any], config: Any) -> None:
    _, shown, _ = run("stats", config(a=ROWS, b=ROWS[:1]), "--json")
    report = json.loads(shown)
    assert set(report) == {"cutoff_len", "datasets", "mix", "epoch"}
    assert report["epoch"] == []
    first = report["datasets"][0]
    assert set(first) == {
        "use",
        "name",
        "num_rows",
        "num_kept",
        "dropped",
        "num_examples",
        "num_tokens",
        "num_supervised_tokens",
        "supervised_share",
        "num_over_cutoff",
        "num_cut_tokens",
        "num_duplicates",
        "lengths",
        "scores",
        "histogram",
    }
    assert sum(one["num_sequences"] for one in first["histogram"]) == 3
    assert report["mix"][1]["examples"] == 0.25


def test_render(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(CONVERSATION) + "\n\n" + json.dumps(CONVERSATION), encoding="utf-8")
    code, shown, error = run("render", "--template", "default", str(file))
    assert (code, error) == (0, "")
    first, second = (json.loads(line) for line in shown.splitlines())
    assert first == second
    assert [part["trainable"] for part in first] == [False, True]
    assert first[1]["text"].startswith("你好")
    assert "<EOS>" in first[1]["text"]
    _, shown, _ = run("render", str(file), "--template=default", "--json")
    record = json.loads(shown.splitlines()[1])
    assert record == {"file": str(file), "line": 3, "sequences": [second]}


def test_render_with_a_tokenizer(run: Callable[..., Any], tmp_path: Path, embedded_model_dir: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(CONVERSATION), encoding="utf-8")
    for name in ("default", "auto"):
        code, shown, _ = run("render", "--template", name, str(file), "--tokenizer", str(embedded_model_dir))
        assert code == 0
        assert "<EOS>" not in shown
        assert "<|im_end|>" in shown


def test_render_shows_the_template_and_not_what_training_adds(run: Callable[..., Any], tmp_path: Path) -> None:
    from llamafactory.data.chat_template import find_record, template_names

    adding = [name for name in template_names() if find_record(name).efficient_eos]
    if not adding:
        pytest.skip("no template has efficient_eos")
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(CONVERSATION), encoding="utf-8")
    _, shown, _ = run("render", "--template", adding[0], str(file))
    assert not json.loads(shown)[-1]["text"].endswith("<EOS>")


def test_a_bad_line_is_named_and_the_others_are_rendered(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(CONVERSATION) + "\n{broken\n" + json.dumps(CONVERSATION), encoding="utf-8")
    code, shown, error = run("render", "--template", "chatml", str(file))
    assert (code, len(shown.splitlines())) == (1, 2)
    assert f"{file}:2: line: the line is not JSON" in error
    file.write_bytes(b"{}\n\xff")
    code, _, error = run("render", "--template", "chatml", str(file))
    assert (code, error) == (1, f"error: {file}:2: the file is not UTF-8 text\n")
    assert run("render", "--template", "chatml", str(tmp_path / "no.jsonl"))[0] == 1


def test_a_thousand_lines_load_no_gpu_stack(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text((json.dumps(CONVERSATION) + "\n") * 1000, encoding="utf-8")
    program = (
        "import sys; from llamafactory.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", program, "data", "render", "--template", "chatml", "c.jsonl"]
    child = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert len(child.stdout.splitlines()) == 1000
