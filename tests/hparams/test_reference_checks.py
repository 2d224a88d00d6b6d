"""What a quantised reference needs: one error each, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from llamafactory.compose import load_config
from llamafactory.extras.errors import ConfigError
from llamafactory.hparams import reference_checks

GOOD: dict[str, Any] = {
    "model_name_or_path": "org/model", "stage": "dpo", "do_train": True, "dataset": "rows", "output_dir": "out",
    "template": "chatml", "ref_model": "org/model", "ref_model_quantization_bit": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    installed = {"bitsandbytes"}
    monkeypatch.setattr(reference_checks, "is_installed", lambda name: name in installed)
    return installed


def problems_of(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    from llamafactory import compose

    monkeypatch.setattr(compose, "PATH_CHECKS", ())  # there are no files here
    try:
        load_config({key: value for key, value in {**GOOD, **changes}.items() if value is not None}, command="train")
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("bits", [4, 8, "4", None])
def test_four_and_eight_bits_are_taken(monkeypatch: pytest.MonkeyPatch, stage: str, bits: Any) -> None:
    assert problems_of(monkeypatch, stage=stage, ref_model_quantization_bit=bits) == []


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"ref_model_quantization_bit": 3}, "not a number of bits", None),
        ({"ref_model_quantization_bit": 0}, "not a number of bits", None),
        ({"ref_model_quantization_bit": True}, "true and false", None),
        ({"ref_model_quantization_bit": "nf4"}, "", None),
        ({"ref_model": None}, "ref_model, which is not set", "ref_model: org/model"),
        ({"pref_loss": "orpo"}, "pref_loss orpo compares with no reference", "remove this key"),
        ({"pref_loss": "simpo", "ref_model": None}, "pref_loss simpo compares with no reference", "remove this key"),
        ({"ref_model_adapters": "one,two"}, "one at most", "export"),
    ],
)
def test_what_cannot_be_is_one_error(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str, fix: str | None
) -> None:
    (problem,) = problems_of(monkeypatch, **changes)
    assert problem.key == "ref_model_quantization_bit"
    assert problem.origin == "dict"
    assert message in problem.render()
    assert fix is None or fix in (problem.fix or "")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, packages: set[str]) -> None:
    packages.clear()
    (problem,) = problems_of(monkeypatch)
    assert 'pip install "llamafactory[bitsandbytes]"' in (problem.fix or "")
