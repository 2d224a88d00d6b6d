"""Every file in `examples/` resolves without a problem; the training ones take a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llamafactory.compose import resolve_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
COMMANDS = {"inference": "chat", "merge_lora": "export", "plan": "plan", "score": "score"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "examples"))


def need_bitsandbytes(content):
    """`make test-quantised` installs it."""
    if "ref_model_quantization_bit" in content:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_an_example_resolves(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = COMMANDS.get(path.parent.name, "train")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    need_bitsandbytes(content)
    words = [str(path)]
    if "adapter_name_or_path" in content:  # made by another example
        (tmp_path / "adapter_config.json").write_text("{}")
        words.append(f"adapter_name_or_path={tmp_path}")
    if "reward_model" in content and content.get("reward_model_type") != "api":
        words.append(f"reward_model={tmp_path}")
    resolution = resolve_config(words, command=command)
    assert resolution.problems == ()
    assert not [note for note in resolution.notes if note.startswith("warning: ")]
    assert path.read_text(encoding="utf-8").startswith("# ")


def run(path, model, output_dir, *more):
    """A step of an example on a tiny model; its exit code."""
    from llamafactory.compose import load_config
    from llamafactory.train.tuner import run_exp

    words = [str(path), f"model_name_or_path={model}", f"output_dir={output_dir}", "max_steps=1", "max_samples=12"]
    return run_exp(load_config([*words, *more])).exit_code


@pytest.fixture(scope="module")
def service():
    """The reward service of the examples, in a process of its own; its address."""
    command = [sys.executable, str(ROOT / "examples" / "rewards" / "service.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]
        process.terminate()


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.parent.name not in COMMANDS], ids=name_of)
def test_a_training_example_takes_a_step(path, tiny_model_dir, tmp_path, monkeypatch, service):
    monkeypatch.chdir(ROOT)
    more = []
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    need_bitsandbytes(content)
    if "ref_model" in content:
        more.append(f"ref_model={tiny_model_dir}")
    if content.get("reward_model_type") == "api":
        more.append(f"reward_model={service}")
    elif "reward_model" in content:  # its folder names the example that makes it
        maker = path.with_name(f"smollm2_lora_{Path(content['reward_model']).name}.yaml")
        assert run(maker, tiny_model_dir, tmp_path / "rm") == 0
        more.append(f"reward_model={tmp_path / 'rm'}")
    assert run(path, tiny_model_dir, tmp_path / "out", *more) == 0
