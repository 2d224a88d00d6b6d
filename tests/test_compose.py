"""Stages and adapters are found by file name; a broken file is reported as itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamafactory.compose import all_sections, load_config, plugin_names, resolve_config

OPTIONS = (
    "from llamafactory.hparams.section import Section, option\n\n\nclass Options(Section):\n"
    "    my_weight: float = option(0.5, 'A weight.', group='mine', ge=0)\n"
)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")


@pytest.fixture
def good() -> dict[str, Any]:
    return {"model_name_or_path": "model", "do_train": True, "output_dir": "out", "dataset": "rows"} | {
        "dataset_dir": {"rows": {"hf_hub_url": "me/rows"}}
    }


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a module of a package of somebody else, and gives its dotted path."""

    def write(name: str, text: str) -> str:
        package = f"foreign_{tmp_path.name.replace('-', '_')}"
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"{package}.{name}"

    return write


def test_stages_and_adapters_are_files() -> None:
    assert "sft" in plugin_names("llamafactory.train.stages")
    assert {"lora", "full"} <= set(plugin_names("llamafactory.model.adapters"))
    assert "finetuning_type: lora" in all_sections()


def test_options_of_the_adapter_in_use(good: dict[str, Any]) -> None:
    config = load_config(good | {"lora_rank": 3, "lora_target": "q_proj,v_proj"})
    assert config.adapter_options.model_dump()["lora_rank"] == 3
    assert config.flat()["lora_target"] == ["q_proj", "v_proj"]


def test_a_dotted_path_brings_its_own_options(good: dict[str, Any], write_module: Callable[[str, str], str]) -> None:
    path = write_module("stage", OPTIONS)
    config = load_config(good | {"stage": path, "my_weight": 0.25})
    assert config.train.stage == path
    assert config.flat()["my_weight"] == 0.25
    (problem,) = resolve_config(good | {"stage": path, "my_weight": -1}).problems
    assert (problem.key, problem.allowed) == ("my_weight", "a number >= 0")


def test_a_mistyped_own_option(good: dict[str, Any], write_module: Callable[[str, str], str]) -> None:
    (problem,) = resolve_config(good | {"stage": write_module("stage", OPTIONS), "my_wieght": 1}).problems
    assert problem.fix == "did you mean 'my_weight'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import no_such_package_at_all\n",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package_at_all'",
        ),
        ("x = (\n", "cannot be loaded: SyntaxError"),
        ("1 / 0\n", "cannot be loaded: ZeroDivisionError"),
        ("x = 1\n", "cannot be loaded: AttributeError"),
        ("Options = dict\n", "is not a Section"),
    ],
)
def test_a_broken_file_is_reported_as_itself(
    text: str, message: str, good: dict[str, Any], write_module: Callable[[str, str], str]
) -> None:
    (problem,) = resolve_config(good | {"stage": write_module("broken", text)}).problems
    assert problem.key == "stage"
    assert message in problem.message
    assert "unknown" not in problem.message


@pytest.mark.parametrize("name", ["nope", "no.such.module", "", "__init__", "a b", "..sft", "sft.x"])
def test_an_unknown_name_lists_the_files(name: str, good: dict[str, Any]) -> None:
    (problem,) = resolve_config(good | {"stage": name}).problems
    assert problem.message == "unknown stage"
    assert "sft" in (problem.allowed or "")


def test_a_stage_that_is_no_text(good: dict[str, Any]) -> None:
    (problem,) = resolve_config(good | {"stage": ["sft"]}).problems
    assert problem.message == "wrong type: a list"


def test_template_names(good: dict[str, Any]) -> None:
    assert load_config(good | {"template": "auto"}).data.template == "auto"
    (problem,) = resolve_config(good | {"template": "chatlm"}).problems
    assert "unknown template" in problem.message
    assert "chatml" in (problem.fix or "")
