"""The errors that users see, and the suggestions and lines that come with them."""

from __future__ import annotations

import pytest

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, DataError, LlamaFactoryError, Problem, SaveError
from llamafactory.extras.secrets import MASK, is_secret_key, mask_text
from llamafactory.extras.suggest import did_you_mean, near_matches


def test_a_problem_shows_what_is_known() -> None:
    problem = Problem(key="seed", origin="a.yaml:3", given="x", message="wrong", allowed="a number", fix="seed: 1")
    assert problem.render() == ("seed (a.yaml:3): wrong\n    given:   x\n    allowed: a number\n    fix:     seed: 1")
    assert Problem(message="wrong", origin="a.yaml").render() == "a.yaml: wrong"
    assert Problem(message="wrong").render() == "wrong"


def test_a_config_error_numbers_its_problems() -> None:
    error = ConfigError([Problem(key="a", message="x", fix="y"), Problem(key="b", message="z")])
    assert str(error) == "2 problems in the configuration:\n1. a: x\n       fix:     y\n2. b: z"
    assert str(ConfigError(Problem(message="x"))) == "1 problem in the configuration:\n1. x"


def test_a_data_error_shows_what_is_known() -> None:
    error = DataError("no answer", where="rows.json:3", found="null", expected="text", fix="write one")
    assert str(error) == ("rows.json:3: no answer\n    found:    null\n    expected: text\n    fix:      write one")


def test_exit_codes() -> None:
    assert [kind.exit_code for kind in (LlamaFactoryError, ConfigError, DataError, SaveError)] == [1, 2, 3, 74]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("learning_rte", ["learning_rate"]),
        ("Learning-Rate", ["learning_rate"]),
        ("stf", ["sft"]),
        ("save", ["save_steps"]),
        ("qqqq", []),
        ("", []),
    ],
)
def test_near_matches(word: str, expected: list[str]) -> None:
    assert near_matches(word, ["learning_rate", "sft", "save_steps", "bf16"]) == expected


def test_did_you_mean_reads_as_a_question() -> None:
    assert did_you_mean("sed", ["seed"]) == "did you mean 'seed'?"
    assert did_you_mean("seeds", ["seed", "seedy"]) in {
        "did you mean 'seed' or 'seedy'?",
        "did you mean 'seedy' or 'seed'?",
    }
    assert did_you_mean("x", ["seed"]) == ""


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ("hf_hub_token", True),
        ("hub-token", True),
        ("swanlab_api_key", True),
        ("max_new_tokens", False),
        ("tokenizer", False),
    ],
)
def test_secret_keys(key: str, is_secret: bool) -> None:
    assert is_secret_key(key) is is_secret


def test_secrets_inside_of_texts() -> None:
    token = "hf_" + "x" * 20
    assert mask_text(f"see https://me:pw@host/{token}") == f"see https://{MASK}@host/{MASK}"
    assert mask_text("saves/task-classification-of-many-things") == "saves/task-classification-of-many-things"


def test_log_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LLAMAFACTORY_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    log.info("a")
    log.note("b\nc")
    log.warn("said once in this test", once=True)
    log.warn("said once in this test", once=True)
    log.debug("d")
    assert capsys.readouterr().err == "a\nnote: b\n      c\nwarning: said once in this test\n"
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "error")
    log.warn("e")
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "debug")
    log.debug("f")
    monkeypatch.setenv("RANK", "1")
    log.warn("g")
    assert capsys.readouterr().err == "debug: f\n"
