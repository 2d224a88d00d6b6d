"""What `runs` says about output folders, without loading torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamafactory.cli import main
from llamafactory.train.checkpoint.manifest import seal
from llamafactory.train.run_index import read_log


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that crashed at step 5 with two checkpoints."""
    folder = tmp_path / "saves" / "a b" / "ü"
    folder.mkdir(parents=True)
    record = {"run_id": "r1", "state": "running", "config": {"learning_rate": 0.5}, "num_processes": 1}
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"current_steps": step, "total_steps": 9, "loss": 9.0 - step} for step in (1, 2, 3, 4, 5)]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"current_st')
    for step, run_id in ((2, "r1"), (4, "r1"), (9, "other")):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "adapter_model.safetensors").write_bytes(b"0" * 100)
        seal(checkpoint, {"run_id": run_id, "step": step})
    return folder


def test_a_crashed_run_is_called_so_and_gets_its_command(run_folder, capsys):
    assert main(["runs", "show", str(run_folder)]) == 0
    text = capsys.readouterr().out
    assert "state        crashed" in text
    assert "progress     5/9 steps" in text
    assert "loss         4.0" in text
    assert "checkpoint-4, 0.0 MB, whole" in text
    assert "checkpoint-9, 0.0 MB, whole, of another run" in text
    command = next(line for line in text.splitlines() if line.startswith("continue"))
    assert f"--rerun '{run_folder}/run.json' 'output_dir={run_folder}'" in command


def test_the_list_goes_down_into_folders(run_folder, tmp_path, capsys):
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)
    assert run["state"] == "crashed"
    assert run["folder"] == str(run_folder)
    assert [one["name"] for one in run["checkpoints"]] == ["checkpoint-2", "checkpoint-4", "checkpoint-9"]
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "3 checkpoints" in capsys.readouterr().out


def test_verify_names_the_damaged_file(run_folder, capsys):
    assert main(["runs", "verify", str(run_folder)]) == 0
    assert "3 checkpoints, 0 broken" in capsys.readouterr().out
    (run_folder / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"0" * 99 + b"1")
    assert main(["runs", "verify", str(run_folder)]) == 1
    text = capsys.readouterr().out
    assert "checkpoint-4: adapter_model.safetensors is damaged" in text
    assert "checkpoint-2: intact" in text


def test_prune_keeps_the_newest_and_those_of_other_runs(run_folder, capsys):
    (run_folder / ".trash-checkpoint-1-7").mkdir()
    assert main(["runs", "prune", str(run_folder), "--keep", "1", "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    assert (run_folder / "checkpoint-2").is_dir()
    assert main(["runs", "prune", str(run_folder), "--keep=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["checkpoint-2"], "dry_run": False}
    assert sorted(path.name for path in run_folder.iterdir() if path.is_dir()) == ["checkpoint-4", "checkpoint-9"]


def test_a_torn_log_is_read_up_to_the_tear(run_folder):
    assert [row["current_steps"] for row in read_log(run_folder)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["delete"], "unknown action 'delete'"),
        (["show"], "one folder is wanted"),
        (["show", "/nowhere"], "/nowhere is no output folder of a run"),
        (["prune", "."], "prune needs --keep N"),
        (["prune", ".", "--keep", "0"], "--keep 0"),
        (["list", "--yaml"], "unknown flag --yaml"),
    ],
)
def test_wrong_words_are_named(words, fragment, capsys):
    assert main(["runs", *words]) == 2
    assert fragment in capsys.readouterr().err


def test_it_loads_no_torch(run_folder, repo_dir):
    program = "import sys; from llamafactory.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, "runs", "show", str(run_folder)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(repo_dir / "src")},
    )  # fmt: skip
    assert done.stdout.rstrip().endswith("False")


def test_prune_never_removes_what_is_intact_in_favour_of_what_is_not(run_folder, capsys):
    (run_folder / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"0" * 99 + b"1")
    for dry in (["--dry-run"], []):
        assert main(["runs", "prune", str(run_folder), "--keep", "1", *dry]) == 0
        assert "0 of 2 checkpoints" in capsys.readouterr().out
    assert (run_folder / "checkpoint-2").is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"config": []}', "[" * 9999])
def test_a_run_whose_record_is_damaged_is_shown_as_such(run_folder, tmp_path, capsys, content):
    (run_folder / "run.json").write_text(content)
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("damaged ")
    assert main(["runs", "show", str(run_folder)]) == 0
    text = capsys.readouterr().out
    assert "why          run.json " in text
    assert "checkpoint-4, 0.0 MB, whole" in text
    assert "continue" not in text
    assert main(["runs", "verify", str(run_folder)]) == 1
    assert "checkpoint-4: intact" in capsys.readouterr().out
    assert main(["runs", "prune", str(run_folder), "--keep", "1"]) == 1
    assert (run_folder / "checkpoint-2").is_dir()


@pytest.mark.parametrize("row", ['{"loss": "x"}', '{"current_steps": null}', '{"total_steps": "9"}', "[1]", "7"])
def test_a_line_that_is_no_row_breaks_nothing(run_folder, tmp_path, capsys, row):
    with (run_folder / "trainer_log.jsonl").open("a") as log:
        log.write(f"\n{row}\n")
    for action in ("list", "show"):
        assert main(["runs", action, str(run_folder)]) == 0
        assert "5/9" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_no_empty_list(tmp_path, capsys):
    assert main(["runs", "list", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
