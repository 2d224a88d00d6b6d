"""What a run leaves to read: a card that any parser takes, results that add up, a record that suffices for a rerun."""

from __future__ import annotations

import json
import os
import re
import shlex
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from llamafactory.commands.rerun import expand_rerun
from llamafactory.compose import load_config, resolve_config
from llamafactory.extras.files import write_json
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.read import read_source
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.train.report import run_record, write_model_card, write_results

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path for name in ("train_lora", "train_full") for path in (ROOT / "examples" / name).glob("*.yaml"))
ODD = st.text(min_size=1, max_size=12) | st.text(
    alphabet="|`'\"\\ \n:#&*!%@{}[]-ü\U0001f600\x7f\x85\u2028", min_size=1
)


def config(base="base", name=None, dataset="rows", **train) -> RunConfig:
    return RunConfig(
        model=ModelConfig(model_name_or_path=base),
        data=DataConfig(dataset=(dataset,)),
        train=TrainConfig(run_name=name, **train),
    )


def card(folder: Path, cfg: RunConfig, metrics: Any = None, readings: Any = ()) -> tuple[dict[str, Any], str]:
    """The front matter and the text of a card."""
    record = {"packages": {"torch": "2"}, "trainable_parameters": 1234}
    write_model_card(folder, cfg, record, metrics or {}, readings)
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def cells(line: str) -> list[str]:
    """The cells of a row of a table, as GitHub reads it."""
    return re.split(r"(?<!\\)\|", line)[1:-1]


@given(base=ODD, name=ODD, dataset=ODD, metric=ODD)
@example(base="a: b # c", name="- x", dataset="a|b", metric="rewards/regex:^a|b$")
@example(base="C:\\models\\new", name="`", dataset="\\", metric="$")
def test_any_characters_leave_a_card_that_can_be_read(tmp_path_factory, base, name, dataset, metric):
    folder = tmp_path_factory.getbasetemp() / "card"
    folder.mkdir(exist_ok=True)
    front, text = card(folder, config(base, name, dataset), {metric: 0.5})
    assert front["base_model"] == base
    assert front["tags"] == ["llama-factory", "lora", "sft"]
    lines = text.split("\n")
    assert lines[1].startswith("# ")
    rows = [line for line in lines if line.startswith("|")]
    assert [len(cells(row)) for row in rows] == [2] * (3 + 2 + 9)  # one figure, nine settings, and their heads
    assert lines.count("```") == 2


@given(
    base=st.text(alphabet=string.printable.strip() + " ü", min_size=1), name=st.sampled_from(["a b", "ü'x", "$HOME"])
)
def test_the_command_of_the_card_means_these_folders_in_a_shell(tmp_path_factory, base, name):
    folder = tmp_path_factory.getbasetemp() / name
    folder.mkdir(exist_ok=True)
    for stage, command in (("sft", "chat"), ("rm", "score")):
        _, text = card(folder, config(base, stage=stage))
        words = shlex.split(text.split("```")[1] if "```" not in base else "\n".join(text.split("\n```\n")[1:2]))
        assert words[:2] == ["llamafactory-cli", command]
        given = {item.key: item.text or item.value for item in read_source(words[2:])}
        assert given["model_name_or_path"] == base
        assert given["adapter_name_or_path"] == str(folder)
        assert ("dataset" in given) is (command == "score")


def test_a_full_model_is_used_without_an_adapter(tmp_path):
    front, text = card(tmp_path, config(finetuning_type="full"), readings=["the loss falls"])
    assert front["library_name"] == "transformers"
    assert f"chat model_name_or_path={tmp_path}\n" in text
    assert "- the loss falls" in text
    assert "adapter_name_or_path" not in text


def test_a_run_in_the_present_folder_has_a_title(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model_card(Path(), config(), {"packages": {}}, {})
    assert f"\n# {tmp_path.name}\n" in Path("README.md").read_text()


def test_names_that_are_no_text_harm_neither_card_nor_record(tmp_path):
    name = os.fsdecode(b"a\xff")  # a file's name may be any bytes
    write_model_card(tmp_path, config(base=name, name=name), {"packages": {}}, {})
    assert "\\udcff" in (tmp_path / "README.md").read_text(encoding="utf-8")
    write_json(tmp_path / "run.json", {"base": name, "other": "ü"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"base": name, "other": "ü"}


def test_results_of_all_parts_add_up(tmp_path):
    write_results(tmp_path, "train", {"train_loss": 1.5, "epoch": 2.0})
    write_results(tmp_path, "eval", {"eval_loss": 0.1, "epoch": 3.0})
    everything = json.loads((tmp_path / "all_results.json").read_text())
    assert everything == {"train_loss": 1.5, "eval_loss": 0.1, "epoch": 3.0}
    assert json.loads((tmp_path / "train_results.json").read_text()) == {"train_loss": 1.5, "epoch": 2.0}


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "3", "\ufffd", "[" * 100_000])
def test_damaged_results_cost_a_warning_and_not_the_end_of_a_training(tmp_path, capsys, content):
    (tmp_path / "all_results.json").write_text(content)
    write_results(tmp_path, "train", {"train_loss": 1.5})
    assert "all_results.json is damaged: it is written anew" in capsys.readouterr().err
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"train_loss": 1.5}


def rerun(record: dict[str, Any], folder: Path) -> RunConfig:
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return load_config(expand_rerun(["--rerun", str(folder / "run.json")]))


def recorded(cfg: RunConfig) -> dict[str, Any]:
    return run_record(cfg, run_id="r", state="running", plan={}, data={}, num_processes=1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_record_of_every_example_is_enough_to_run_it_again(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [str(path)]
    if "reward_model:" in path.read_text() and "reward_model_type: api" not in path.read_text():
        words.append(f"reward_model={tmp_path}")
    resolution = resolve_config(words)
    if resolution.config is None and {problem.key for problem in resolution.problems} == {
        "ref_model_quantization_bit"
    }:
        pytest.skip("needs bitsandbytes")
    before = resolution.require()
    after = rerun(recorded(before), tmp_path).flat()
    own = {"output_dir": f"{before.train.output_dir}-rerun", "rerun_of": str(tmp_path / "run.json")}
    assert after == before.flat() | own | {"overwrite_output_dir": False}


VALUES = st.text(min_size=1).filter(lambda text: text.strip() == text and text.lower() not in ("null", "none", "~"))


@given(
    name=VALUES,
    system=VALUES,
    rate=st.floats(1e-9, 1.0),
    kwargs=st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.none() | st.booleans(), max_size=3),
    epochs=st.floats(0.1, 9.0),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "down_proj"]), min_size=1, unique=True),
)
def test_values_of_any_kind_survive_the_record(tmp_path_factory, name, system, rate, kwargs, epochs, targets):
    folder = tmp_path_factory.getbasetemp()
    before = load_config(
        {
            "model_name_or_path": "m", "dataset": "sums", "dataset_dir": str(ROOT / "data"), "template": "chatml",
            "do_train": True, "output_dir": str(folder / "out"), "run_name": name, "default_system": system,
            "learning_rate": rate, "lr_scheduler_kwargs": kwargs, "num_train_epochs": epochs, "lora_target": targets,
        }
    )  # fmt: skip
    own = {"output_dir": f"{folder / 'out'}-rerun", "rerun_of": str(folder / "run.json")}
    assert rerun(recorded(before), folder).flat() == before.flat() | own


def test_a_record_holds_no_secret(tmp_path, capsys):
    token = "hf_" + "a1B2" * 8
    options = {
        "model_name_or_path": "m", "run_name": f"https://me:{token}@hub/m", "dataset": "sums", "template": "chatml",
        "dataset_dir": str(ROOT / "data"), "do_train": True, "output_dir": str(tmp_path), "hf_hub_token": token,
    }  # fmt: skip
    cfg = load_config(options)
    record = recorded(cfg)
    assert token not in json.dumps(record)
    assert record["packages"]["torch"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    words = expand_rerun(["--rerun", str(tmp_path / "run.json")])
    assert not any(word.startswith("hf_hub_token") for word in words)
    assert "must be given again" in capsys.readouterr().err
