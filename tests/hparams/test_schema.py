"""The JSON Schema that editors use."""

from __future__ import annotations

from typing import Any

import pytest

from llamafactory.compose import all_sections
from llamafactory.hparams.known_keys import load_known_keys
from llamafactory.hparams.schema import json_schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(all_sections(), load_known_keys())


def test_every_key_is_there_and_no_other(schema: dict[str, Any]) -> None:
    fields = {key for section in all_sections().values() for key in section.model_fields}
    assert set(schema["properties"]) == fields | load_known_keys().names()
    assert schema["additionalProperties"] is False
    assert schema["type"] == "object"


def test_properties_describe_the_options(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    assert properties["cutoff_len"]["minimum"] == 8
    assert properties["cutoff_len"]["default"] == 2048
    assert properties["save_strategy"]["enum"] == ["no", "steps", "epoch"]
    assert {part["type"] for part in properties["dataset"]["anyOf"]} == {"array", "string", "null"}
    assert {part["type"] for part in properties["lr_scheduler_kwargs"]["anyOf"]} == {"object", "string", "null"}
    assert properties["lora_rank"]["description"].endswith("Only with finetuning_type: lora.")
    assert properties["evaluation_strategy"]["deprecated"] is True


def test_nothing_of_our_own_is_left_in_it(schema: dict[str, Any]) -> None:
    assert "$ref" not in str(schema)
    assert not {"group", "secret", "title"} & {name for part in schema["properties"].values() for name in part}
