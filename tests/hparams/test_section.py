"""What a section accepts, refuses and says about its fields."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from llamafactory.compose import all_sections
from llamafactory.hparams.section import Section, allowed_text, default_of, fit_value, group_of, kinds_of, option


class Example(Section):
    """One field of each kind."""

    count: int = option(1, "A count.", group="g", ge=1, le=9)
    share: float | None = option(None, "A share.", group="g", gt=0, lt=1)
    names: tuple[str, ...] = option((), "Names.", group="g")
    mode: Literal["a", "b"] = option("a", "A mode.", group="g")
    more: dict[str, Any] | None = option(None, "More.", group="g")
    place: str | bool | None = option(None, "A place.", group="g")
    secret: str | None = option(None, "A secret.", group="g", secret=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"count": "3"}, 3),
        ({"count": "3e0"}, 3),
        ({"count": 3.0}, 3),
        ({"share": "1e-4"}, 1e-4),
        ({"share": "null"}, None),
        ({"names": "a, b,,"}, ("a", "b")),
        ({"names": ["a", 1]}, ("a", "1")),
        ({"names": '["a,b"]'}, ("a,b",)),
        ({"names": None}, ()),
        ({"more": '{"a": 1}'}, {"a": 1}),
        ({"place": "true"}, True),
        ({"place": "tree"}, "tree"),
        ({"secret": 12}, "12"),
    ],
)
def test_what_is_accepted(given: dict[str, Any], expected: Any) -> None:
    assert getattr(Example(**given), next(iter(given))) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"count": True},
        {"count": 0},
        {"count": 1.5},
        {"count": "x"},
        {"count": None},
        {"share": float("nan")},
        {"share": False},
        {"share": 1},
        {"names": True},
        {"names": {"a": 1}},
        {"mode": "c"},
        {"more": "x"},
        {"more": "{a"},
        {"secret": True},
        {"unknown": 1},
    ],
)
def test_what_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Example(**given)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("count", "a whole number >= 1 and <= 9"),
        ("share", "a number > 0 and < 1 or null"),
        ("names", "a list, or text with commas"),
        ("mode", "one of a, b"),
        ("more", "a mapping, or JSON text or null"),
        ("place", "true or false or text or null"),
    ],
)
def test_what_is_allowed_in_words(key: str, text: str) -> None:
    assert allowed_text(Example.model_fields[key]) == text


def test_secrets_are_not_in_the_repr() -> None:
    assert "abc" not in repr(Example(secret="abc"))


def test_unsupported_types_are_an_error_of_the_program() -> None:
    with pytest.raises(TypeError, match="no option can have the type"):
        kinds_of(set[str])


def test_fit_value_leaves_other_values_alone() -> None:
    assert fit_value(3, frozenset({"int"})) == 3


@pytest.mark.parametrize("name", sorted(all_sections()))
def test_every_option_is_documented_and_its_default_is_valid(name: str) -> None:
    section = all_sections()[name]
    for key, field in section.model_fields.items():
        assert field.description, key
        assert field.description.endswith("."), key
        assert group_of(field), key
        assert allowed_text(field), key
        section(**{key: default_of(field)})


def test_no_key_is_in_two_sections_of_a_run() -> None:
    always = [key for name, section in all_sections().items() if ": " not in name for key in section.model_fields]
    assert len(always) == len(set(always))
    found: dict[tuple[str, str], object] = {}
    for name, section in all_sections().items():
        kind, _, of = name.partition(": ")
        for key, field in section.model_fields.items() if of else ():
            assert key not in always
            assert found.setdefault((kind, key), field.annotation) == field.annotation  # stages may share a key
    assert not {key for kind, key in found if kind == "stage"} & {key for kind, key in found if kind != "stage"}
