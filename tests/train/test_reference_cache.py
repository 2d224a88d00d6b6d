"""The reference runs once: the same losses, whatever is killed, and a file that is not the reference's is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.reference import Reference
from llamafactory.train import reference_cache
from llamafactory.train.tuner import run_exp

PAIRS = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
         "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
JUDGED = {"file_name": "judged.json", "formatting": "sharegpt",
          "columns": {"messages": "conversations", "kto_tag": "label"}}  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the forward passes of the reference."""
    counted: list[int] = []
    original = Reference.of

    def count(self: Reference, policy: Any) -> Any:
        counted.append(1)
        return original(self, policy)

    monkeypatch.setattr(Reference, "of", count)
    return counted


@pytest.fixture
def run(
    train_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    monkeypatch.setenv("LLAMAFACTORY_REFERENCE_CACHE", str(tmp_path / "kept"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    asked = [[{"from": "human", "value": f"Say {number}."}] for number in range(6)]
    said = [f"number {number} " * (1 + number % 3) for number in range(6)]
    pairs = [
        {"conversations": ask, "chosen": {"from": "gpt", "value": text}, "rejected": {"from": "gpt", "value": "no"}}
        for ask, text in zip(asked, said, strict=True)
    ]
    judged = [
        {"conversations": [*ask, {"from": "gpt", "value": text}], "label": number % 3 != 1}
        for number, (ask, text) in enumerate(zip(asked, said, strict=True))
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "judged.json").write_text(json.dumps(judged))
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": PAIRS, "judged": JUDGED}))

    def start(stage: str = "dpo", **changes: Any) -> list[dict[str, Any]]:
        options = {
            "stage": stage, "dataset_dir": str(folder), "dataset": "judged" if stage == "kto" else "pairs",
            "learning_rate": 1e-3, "num_train_epochs": 2, "val_size": 2, "eval_strategy": "epoch",
            "overwrite_output_dir": True, "save_strategy": "no",
        }  # fmt: skip
        run_exp(train_config(**(options | changes)))
        text = (tmp_path / "out" / "trainer_log.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return start


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").glob("*")) if (tmp_path / "kept").is_dir() else []


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    names = (
        "loss",
        "eval_loss",
        "grad_norm",
        "rewards/margins",
        "eval_rewards/margins",
        "kl",
        "change_per_token/chosen",
    )
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {"stage": "dpo"},
        pytest.param({"stage": "kto"}, marks=pytest.mark.long),
        pytest.param(
            {"stage": "dpo", "pref_loss": "kto_pair", "finetuning_type": "full", "flash_attn": "disabled"},
            marks=pytest.mark.long,
        ),
    ],
    ids=["dpo", "kto", "kto_pair padded full"],
)
def test_the_losses_are_those_of_a_reference_that_runs_in_every_step(
    run: Callable[..., Any], passes: list[int], tmp_path: Path, options: dict[str, Any]
) -> None:
    live, num_live = numbers(run(**options, cache_reference=False)), len(passes)
    assert not kept(tmp_path)
    passes.clear()
    first, num_first = numbers(run(**options)), len(passes)  # more than one epoch: kept without being told
    files = kept(tmp_path)
    assert len(files) == 2  # of training and of evaluation
    passes.clear()
    second, num_second = numbers(run(**options)), len(passes)
    assert kept(tmp_path) == files
    assert first == second  # bit by bit
    for own, other in zip(live, first, strict=True):
        assert other == pytest.approx(own, rel=1e-5, abs=1e-6)
    assert num_second <= num_first < num_live


def test_a_file_that_was_left_half_is_filled_and_one_that_was_changed_is_refused(
    run: Callable[..., Any], passes: list[int], tmp_path: Path
) -> None:
    whole = numbers(run())
    files = kept(tmp_path)
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents, strict=True):
        half = len(content) // 8 * 4
        path.write_bytes(content[:half] + bytes(len(content) - half))  # as it is after a kill
    passes.clear()
    assert numbers(run()) == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in whole]
    for path, content in zip(files, contents, strict=True):
        ours, before = (
            np.invert(np.frombuffer(data, np.uint32)).view(np.float32) for data in (path.read_bytes(), content)
        )
        np.testing.assert_allclose(ours, before, atol=1e-5)
    words = np.invert(np.frombuffer(contents[0], np.uint32)).view(np.float32) - np.float32(0.01)
    for path in files:
        path.write_bytes(
            np.invert(words.view(np.uint32)).tobytes()[: path.stat().st_size].ljust(path.stat().st_size, b"x")
        )
    with pytest.raises(LlamaFactoryError, match="not those of the reference") as caught:
        run()
    assert "overwrite_cache" in str(caught.value)
    assert numbers(run(overwrite_cache=True)) == whole


@pytest.mark.long
def test_a_file_belongs_to_its_reference_and_its_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_size": 0, "eval_strategy": "no"}
    run(**options)
    run(**options, learning_rate=1e-2, pref_beta=0.3, seed=42)
    assert len(kept(tmp_path)) == 1  # neither is part of the reference
    run(**options, cutoff_len=12)
    assert len(kept(tmp_path)) == 2
    run(**options, template="alpaca")
    assert len(kept(tmp_path)) == 3


@pytest.mark.long
def test_one_epoch_keeps_nothing_unless_told(run: Callable[..., Any], tmp_path: Path) -> None:
    run(num_train_epochs=1)
    assert not kept(tmp_path)
    run(num_train_epochs=1, cache_reference=True)
    assert len(kept(tmp_path)) == 2


@pytest.mark.long
def test_a_full_disk_costs_time_and_nothing_else(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = numbers(run(cache_reference=False))

    def full(self: Any, *, remakes: bool = False) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_cache.Known, "create", full)
    assert numbers(run()) == expected
    assert "the reference runs in every step" in capfd.readouterr().err


MAKE_ANEW = """
import sys
from pathlib import Path
import numpy as np
from llamafactory.train.reference_cache import Known

known = Known(path=Path(sys.argv[1]), starts=np.array([0, 2, 5]))
known.create(remakes=True)
assert known.missing().tolist() == [0, 1]
known.write([(0, np.array([-7, -7], np.float32))])
"""


def test_a_file_that_another_process_makes_anew_stays_as_it_was_for_its_user(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "a.logps"
    values = [np.array([-1, -2], np.float32), np.array([-3, -4, -5], np.float32)]
    known = reference_cache.Known(path=path, starts=np.array([0, 2, 5]))
    known.create()
    assert known.missing().tolist() == [0, 1]
    known.write(enumerate(values))
    subprocess.run([sys.executable, "-c", MAKE_ANEW, str(path)], check=True)
    assert not len(known.missing())
    assert all((known.read(row) == numbers).all() for row, numbers in enumerate(values))
    later = reference_cache.Known(path=path, starts=np.array([0, 2, 5]))
    later.create()
    assert later.missing().tolist() == [1]  # goes on with what the other process left
    assert later.read(0).tolist() == [-7, -7]
    assert sorted(path.parent.iterdir()) == [path]
