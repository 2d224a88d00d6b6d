"""What a command may load before it starts: help and checks must not wait for a GPU stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"accelerate", "datasets", "gradio", "matplotlib", "pandas", "peft", "torch", "transformers", "trl"}
NOT_FOR_HELP = HEAVY | {"numpy", "pydantic", "rich", "yaml"}
PROGRAM = """
import json, sys
from llamafactory.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def loaded_by(words: list[str], folder: Path) -> tuple[int, set[str]]:
    """Exit code of a command in a fresh process, and the packages that it loaded."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, cwd=folder, check=True
    )
    code, modules = json.loads(child.stderr.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize("word", ["version", "help"])
def test_version_and_help_load_almost_nothing(word: str, tmp_path: Path) -> None:
    code, modules = loaded_by([word], tmp_path)
    assert code == 0
    assert modules & NOT_FOR_HELP == set()


@pytest.mark.parametrize("words", [["train", "--help"], ["check", "--schema"], ["tarin"], ["train", "sed=1"]])
def test_help_of_commands_and_errors_load_no_gpu_stack(words: list[str], tmp_path: Path) -> None:
    assert loaded_by(words, tmp_path)[1] & HEAVY == set()


def test_check_loads_no_gpu_stack(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: org/model\ndataset: rows\ndataset_dir: .\ndo_train: true\noutput_dir: out\n"
        "template: chatml\nlora_rank: 4\npref_beta: 0.2\nplot_loss: true\n",
        encoding="utf-8",
    )
    code, modules = loaded_by(["check", "c.yaml"], tmp_path)
    assert code == 0
    assert modules & HEAVY == set()
    assert "pydantic" in modules


def test_the_package_itself_loads_nothing(tmp_path: Path) -> None:
    program = "import sys; before = set(sys.modules); import llamafactory; print(*(set(sys.modules) - before))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    loaded = set(child.stdout.split())
    assert {name for name in loaded if name.startswith("llamafactory")} == {"llamafactory"}
    assert {name.partition(".")[0] for name in loaded} - {"llamafactory"} <= set(sys.stdlib_module_names)
