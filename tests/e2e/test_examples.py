"""Every file in `examples/` resolves without a problem; the training ones take a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llamafactory.compose import resolve_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
COMMANDS = {"inference": "chat", "merge_lora": "export", "plan": "plan", "score": "score"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "examples"))


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_an_example_resolves(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = COMMANDS.get(path.parent.name, "train")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = [str(path)]
    if "adapter_name_or_path" in content:  # made by another example
        (tmp_path / "adapter_config.json").write_text("{}")
        words.append(f"adapter_name_or_path={tmp_path}")
    resolution = resolve_config(words, command=command)
    assert resolution.problems == ()
    assert not [note for note in resolution.notes if note.startswith("warning: ")]
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.parent.name not in COMMANDS], ids=name_of)
def test_a_training_example_takes_a_step(path, tiny_model_dir, tmp_path, monkeypatch):
    from llamafactory.compose import load_config
    from llamafactory.train.tuner import run_exp

    monkeypatch.chdir(ROOT)
    words = [
        str(path),
        f"model_name_or_path={tiny_model_dir}",
        f"output_dir={tmp_path}",
        "max_steps=1",
        "max_samples=12",
    ]
    assert run_exp(load_config(words)).exit_code == 0
