"""The command line: the table of commands, their help, their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import llamafactory
from llamafactory import cli
from llamafactory.extras.errors import DataError

GOOD = "model_name_or_path: model\ndataset: rows\ndo_train: true\noutput_dir: out\nhf_hub_token: abc-secret\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text("[]", encoding="utf-8")
    (tmp_path / "data" / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    (tmp_path / "c.yaml").write_text(GOOD, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", [[], ["help"], ["-h"], ["--help"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    for name in [*cli.COMMANDS, "version", "help"]:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("word", ["version", "--version", "-v"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 0
    assert capsys.readouterr().out == f"LLaMA Factory {llamafactory.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_imported(name: str) -> None:
    module, function, help_line = cli.COMMANDS[name]
    assert callable(getattr(import_module(module), function))
    assert help_line


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("zzzz", "unknown command 'zzzz'\n"),
        ("webui", "known, but not implemented in this version; alternative:"),
        ("c.yaml", "did you mean 'llamafactory-cli train c.yaml'?"),
    ],
)
def test_unknown_commands(word: str, fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "x"]) == 2
    output = capsys.readouterr()
    assert fragment in output.err
    assert output.out == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"llamafactory-cli {name}: ")
    if name in {"train", "check"}:
        for part in ("learning_rate = 5e-05", "lora_rank = 8", "[a whole number >= 8]", "Optimizer", "max_steps = -1"):
            assert part in shown
    if name == "score":
        assert "per_device_eval_batch_size = " in shown
        assert "learning_rate" not in shown
    if name == "export":
        assert "export_dir = null" in shown
        assert "learning_rate" not in shown


def test_check_of_a_good_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "c.yaml", "seed=7", "preprocessing_batch_size=5"]) == 0
    shown = capsys.readouterr().out
    assert "set (6):" in shown
    assert "  model_name_or_path  model     c.yaml:1" in shown
    assert "  seed                7         command line" in shown
    assert "note: accepted, without effect:" in shown
    assert shown.endswith("no problems: the command train can run this configuration\n")
    assert "abc-secret" not in shown


def test_check_of_a_broken_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "c.yaml", "sed=7", "bf16=maybe"]) == 2
    shown = capsys.readouterr().out
    assert "2 problems in the configuration:\n1. sed (command line): unknown key" in shown


def test_check_for_another_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--command", "export", "c.yaml"]) == 2
    assert "export_dir: missing" in capsys.readouterr().out
    assert cli.main(["check", "c.yaml", "--command=chat"]) == 0
    assert cli.main(["check", "c.yaml", "--command", "chta"]) == 2
    assert "did you mean 'chat'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        ("adapter_name_or_path=a dataset=d per_device_eval_batch_size=8", "score"),
        ("export_dir=e", "export"),
        ("template=chatml max_new_tokens=8", "chat"),
        ("dataset=d learning_rate=1e-4", "train"),
        ("dataset=d output_dir=o export_dir=e", "train"),
        ("eval_dataset=d", "train"),
        ("dataset=d --command train", "train"),
        ("do_train", "train"),
        ("dataset=d finetuning_type=lora lora_rank=8", "train"),
        ("dataset=d pref_beta=0.2", "train"),
        ("dataset=d val_size=0.1", "train"),
        ("dataset=d template=chatml cutoff_len=64 max_samples=9 dataset_dir=x finetuning_type=lora", "score"),
    ],
)
def test_check_judges_for_the_command_that_the_keys_are_for(
    keys: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["check", "model_name_or_path=m", *keys.split(), "--json"])
    assert json.loads(capsys.readouterr().out)["command"] == command


def test_check_says_for_which_command_it_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, is_said in (["dataset=d"], True), (["dataset=d", "--command", "score"], False), (["do_train"], False):
        cli.main(["check", "model_name_or_path=m", *words])
        said = "note: the keys look like those of the command score; --command NAME judges them for another"
        assert (said in capsys.readouterr().out) is is_said


def test_check_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "c.yaml", "--json", "sed=7"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["command"]) == (False, "train")
    assert report["problems"][0]["key"] == "sed"
    values = {value["key"]: value for value in report["values"]}
    assert values["dataset"] == {"key": "dataset", "value": ["rows"], "origin": "c.yaml:2", "section": "data"}


def test_check_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


def test_train_with_a_broken_config_shows_no_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "c.yaml", "sed=7"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "error: 1 problem in the configuration:\n1. sed (command line): unknown key\n"
        "       given:   7\n       fix:     did you mean 'seed'?\n"
    )


def replace_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int = 0) -> None:
    def run(argv: list[str]) -> int:
        if error is not None:
            raise error
        return code

    monkeypatch.setattr("llamafactory.commands.env.main", run)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, 0, ""),
        (DataError("no rows", where="a.json"), 3, "error: a.json: no rows\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace_command(monkeypatch, error)
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err == text


def test_the_code_of_a_command_is_the_code_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(monkeypatch, None, code=143)
    assert cli.main(["env"]) == 143


def test_mistakes_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(monkeypatch, ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_a_closed_pipe_is_quiet() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "llamafactory", "check", "--schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 141


def test_env_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    for part in ("llamafactory version", "Platform", "Python version", "PyTorch version", "Transformers version"):
        assert f"- {part}: " in shown
    assert "- Git commit: " in shown
    assert "- Default data directory: " in shown


def test_chat_and_export_get_their_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("llamafactory.chat.repl.run", lambda config: seen.append(config) or 0)
    monkeypatch.setattr("llamafactory.export.run", lambda config: seen.append(config) or 5)
    assert cli.main(["chat", "--model_name_or_path", "model"]) == 0
    assert cli.main(["export", "--model_name_or_path", "model", "export_dir=merged model"]) == 5
    assert [config.command for config in seen] == ["chat", "export"]
    assert seen[1].export.export_dir == "merged model"


def test_train_hands_its_words_to_the_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("llamafactory.launcher.launch_train", lambda argv, config: seen.append((argv, config)) or 0)
    words = ["c.yaml", "run_name=a b"]
    assert cli.main(["train", *words]) == 0
    assert seen[0][0] == words
    assert seen[0][1].train.run_name == "a b"
