"""Numbers that are not finite, pickles, odd paths, changed configurations, runs that are run again."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from pathlib import Path

import pytest
from tests.faults.cells import CELLS
from tests.faults.harness import Place


@pytest.fixture
def place(make_place) -> Place:
    return make_place(save_total_limit="9")


def test_a_step_that_is_not_finite_leaves_the_weights_of_the_step_before(place):
    reference = place.finish("reference", "save_steps=1", "save_total_limit=99")
    run = place.begin("nan", fault="step:6:nan")
    assert run.wait() == 1
    assert "loss or gradient of step 6 is not finite: the step was not taken" in run.text
    assert f"is saved in {place.folder / 'nan' / 'checkpoint-5'}. Its rows: rows.json#" in run.text
    weights = [
        (place.folder / name / "checkpoint-5" / "adapter_model.safetensors").read_bytes()
        for name in ("reference", "nan")
    ]
    assert weights[0] == weights[1]
    assert json.loads((place.folder / "nan" / "run.json").read_text())["state"] == "failed"
    again = place.begin("nan", "on_nan=skip:1", fault="step:1:nan")  # as the message says
    assert again.wait() == 0, again.text[-2000:]
    assert "step 6 is left out, because it is not finite (1 of at most 1)" in again.text
    assert place.begin("nan again", fault="step:6:nan").wait() == 1
    assert place.finish("nan again") == reference


def test_a_step_that_is_not_finite_can_be_left_out(place):
    run = place.begin("skip", "on_nan=skip:1", fault="step:6:nan")
    assert run.wait() == 0, run.text[-2000:]
    assert "step 6 is left out, because it is not finite (1 of at most 1); rows: rows.json#" in run.text
    rows = [json.loads(line) for line in (place.folder / "skip" / "trainer_log.jsonl").read_text().splitlines()]
    assert [row["current_steps"] for row in rows if "loss" in row] == [step for step in range(1, 22) if step != 6]
    run = place.begin("skip too often", "on_nan=skip:1", fault="step:6:nan,step:8:nan")
    assert run.wait() == 1
    assert "loss or gradient of step 8 is not finite" in run.text


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_are_never_loaded(place, faults_model):
    mark = place.folder / "code has run"
    evil = pickle.dumps(Evil(mark))
    pickle.loads(evil)
    assert mark.exists()  # the pickle does what the test is about
    mark.unlink()
    folder = place.folder / "pickles"
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "value_head.bin"):
        (checkpoint / name).write_bytes(evil)
        (folder / name).write_bytes(evil)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    (checkpoint / "adapter_model.bin").write_bytes(evil)

    fresh = place.begin("pickles")
    assert fresh.wait() == 2
    assert "holds files of another run (checkpoint-4)" in fresh.text
    named = place.begin("pickles", f"resume_from_checkpoint={checkpoint}")
    assert named.wait() == 1
    assert f"{checkpoint} is not used: MANIFEST.json is missing" in named.text
    model = place.folder / "model"
    shutil.copytree(faults_model, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(evil)
    assert place.begin("from pickle", f"model_name_or_path={model}").wait() != 0
    assert place.begin("adapter", f"adapter_name_or_path={checkpoint}").wait() != 0
    assert not mark.exists()


def test_the_whole_path_in_a_folder_with_a_space_and_an_umlaut(make_place):
    place = make_place(folder="a b/ü", **CELLS["sft lora evaluated, best kept"])
    reference = place.finish("reference ü")
    assert place.begin("mein Lauf", fault="step:5:kill").wait() == -9
    assert place.finish("mein Lauf") == reference


def test_a_changed_configuration_is_shown_and_may_be_allowed(place):
    assert place.begin("changed", "async_save=false", fault="step:5:kill").wait() == -9
    run = place.begin("changed", "learning_rate=3e-3")
    assert run.wait() == 2
    assert "learning_rate 0.01 -> 0.003" in run.text
    assert "--allow-change learning_rate" in run.text
    assert place.begin("changed", "learning_rate=3e-3", "--allow-change", "learning_rate").wait() == 0
    log = [json.loads(line) for line in (place.folder / "changed" / "trainer_log.jsonl").read_text().splitlines()]
    rates = {row["current_steps"]: row["lr"] for row in log if "lr" in row}
    assert rates[4] == pytest.approx(1e-2 * 18 / 21)
    assert rates[5] == pytest.approx(3e-3 * 17 / 21)
    assert place.begin("harmless", fault="step:5:kill").wait() == -9
    assert place.begin("harmless", "save_steps=3", "logging_steps=2").wait() == 0


def test_changed_rows_are_refused_and_may_be_allowed(place):
    assert place.begin("rows", fault="step:5:kill").wait() == -9
    rows = json.loads((place.folder / "rows.json").read_text())
    (place.folder / "rows.json").write_text(json.dumps([*rows[:-1], {"instruction": "x", "output": "y"}]))
    run = place.begin("rows")
    assert run.wait() == 2
    assert "was started with other rows" in run.text
    assert place.begin("rows", "--allow-change", "data").wait() == 0


def test_accumulation_instead_of_batch_size_continues_with_the_same_rows(place):
    reference = place.finish("reference")
    assert place.begin("split", fault="step:5:kill").wait() == -9
    run = place.begin("split", "per_device_train_batch_size=1", "gradient_accumulation_steps=2")
    assert run.wait() == 0, run.text[-2000:]
    assert "every step holds the rows that it would have held" in run.text
    assert place.outcome("split").rows == reference.rows


def test_a_recorded_run_is_run_again(place):
    reference = place.finish("first", "deterministic=true")
    again = place.zygote.start(
        ["train", "--rerun", str(place.folder / "first" / "run.json")],
        place.folder / "again.log",
        trace=place.folder / "first-rerun.trace",
    )
    assert again.wait() == 0, again.text[-2000:]
    assert "rerun: rows and versions are those of the recorded run" in again.text
    assert place.outcome("first-rerun") == reference
    record = json.loads((place.folder / "first-rerun" / "run.json").read_text())
    assert record["config"]["full_determinism"] is True
    (place.folder / "rows.json").write_text((place.folder / "rows.json").read_text().replace("Say 3.", "Say three."))
    other = place.zygote.start(
        ["train", "--rerun", str(place.folder / "first" / "run.json"), f"output_dir={place.folder / 'other'}"],
        place.folder / "other.log",
    )
    assert other.wait() == 2
    assert "the rows are not those of the recorded run: rows: " in other.text


def test_two_deterministic_runs_are_bit_equal(make_place):
    place = make_place(**CELLS["sft full packed, bf16"], deterministic="true")
    assert place.finish("one") == place.finish("two")


def test_a_run_that_gets_no_better_stops_early_also_after_a_kill(make_place):
    place = make_place(
        val_size="4", eval_strategy="steps", eval_steps="1", save_steps="1", early_stopping_steps="3",
        learning_rate="0.5", num_train_epochs="9", load_best_model_at_end="true",
    )  # fmt: skip
    reference = place.finish("reference")
    log = (place.folder / "reference.log").read_text()
    assert "stopped early: 3 evaluations in a row were no better" in log
    last = max(step for step, _, _ in reference.losses)
    best = last - 3
    assert f"weights of checkpoint-{best}" in log
    assert (place.folder / "reference" / "best").resolve().name == f"checkpoint-{best}"
    results = json.loads((place.folder / "reference" / "eval_results.json").read_text())
    logged = {step: value for step, key, value in reference.losses if key == "eval_loss"}
    assert results["eval_loss"].hex() == logged[best] == min(logged.values(), key=float.fromhex)
    assert place.begin("killed", fault=f"step:{last}:kill").wait() == -9
    assert place.finish("killed") == reference


def test_a_run_keeps_its_reference_while_another_one_makes_it_anew(make_place):
    place: Place = make_place(**CELLS["dpo lora"])
    env = {"LLAMAFACTORY_REFERENCE_CACHE": str(place.folder / "references")}
    run = place.begin("used", fault="step:3:sleep=1", env=env)
    run.reach_fault()
    run.send(signal.SIGSTOP)
    (file,) = (place.folder / "references").iterdir()
    number = file.stat().st_ino
    other = place.begin("other", "overwrite_cache=true", fault="reference:1:kill", env=env)
    assert other.wait() == -9, other.text[-2000:]
    assert file.stat().st_ino != number
    assert not any(file.read_bytes())  # nothing is known there yet
    run.send(signal.SIGCONT)
    assert run.wait() == 0, run.text[-2000:]
    assert place.begin("other", "overwrite_cache=true", env=env).wait() == 0
    assert place.outcome("used") == place.outcome("other")
