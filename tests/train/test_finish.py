"""The end of a run: what is written is whole or not there, and the last line tells the truth."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamafactory.extras import failpoints
from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem, SaveError
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.model import ModelConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.train import finish, plot, report
from llamafactory.train.checkpoint.manifest import seal
from llamafactory.train.checkpoint.snapshot import TRAINING_FILES
from llamafactory.train.finish import RunRecord, write_outcome
from llamafactory.train.job import FitResult, Job
from llamafactory.train.memory_use import Peak
from llamafactory.train.signals import StopSignal

HISTORY = [{"current_steps": step, "loss": 4.0 - step} for step in (1, 2, 3)]
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


class Files:
    """Stands for `ModelFiles`: writes two files, and fails before the one at `fails_at`."""

    fails_at: int | None = None
    error: Exception = FULL_DISK

    def prepare(self, *, is_async: bool, is_writer: bool) -> Callable[[Path], None]:
        return self.write

    def write(self, folder: Path) -> None:
        for place, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
            if place == self.fails_at:
                (folder / name).write_bytes(b"ha")  # half of it
                raise self.error
            (folder / name).write_bytes(b"new weights")


class Predicting:
    """Stands for `Predictions`."""

    is_written, in_evaluation = True, False
    found: Any = {"eval_rouge-1": 50.0, "predict_runtime": 1.0}

    def write(self, folder: Path) -> dict[str, float]:
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


def state(**changes: Any) -> Any:
    return SimpleNamespace(**{"step": 3, "epoch": 1.5, "log_history": HISTORY, "best": {}} | changes)


def result(**changes: Any) -> FitResult:
    options: dict[str, Any] = {
        "state": state(), "stop_signal": 0, "metrics": {"train_loss": 1.25, "epoch": 1.5}, "last_checkpoint": None,
        "evaluation": {"eval_loss": 0.5, "eval_runtime": 2.0},
    }  # fmt: skip
    return FitResult(**options | changes)


class End:
    """A run that is about to end in a folder."""

    def __init__(self, folder: Path, **train: Any) -> None:
        self.folder, self.files = folder, Files()
        folder.mkdir(exist_ok=True)
        self.cfg = RunConfig(
            model=ModelConfig(model_name_or_path="base"),
            data=DataConfig(dataset=("rows",)),
            train=TrainConfig(output_dir=str(folder), do_train=True, **train),
        )
        self.accelerator: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, trackers=[])
        document = {"config": {}, "data": {}, "num_processes": 1, "times_continued": 0, "packages": {"torch": "2"}}
        self.record = RunRecord(path=folder / "run.json", document=document, is_training=True)
        self.predictions: Any = None

    def write(self, found: FitResult | None) -> report.RunResult:
        job: Any = Job(
            cfg=self.cfg.train, output_dir=self.folder, run_id="r", accelerator=self.accelerator, module=None,  # type: ignore[arg-type]
            updates=None, feed=None, evaluation={}, total_steps=4, start=None, model_files=self.files,  # type: ignore[arg-type]
            step_flops=lambda lengths, targets: None, measure_peak=lambda: 1.0, predictions=self.predictions,
        )  # fmt: skip
        plan: Any = SimpleNamespace(device="cpu", costs=None)
        return write_outcome(self.cfg, job, self.record, found, plan, Peak(before=0))

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def end(tmp_path: Path) -> End:
    return End(tmp_path / "out", plot_loss=True)


def test_a_good_end_has_all_files_and_says_so(end):
    done = end.write(result())
    assert end.names() == {
        "adapter_config.json", "adapter_model.safetensors", "train_results.json", "eval_results.json",
        "all_results.json", "trainer_state.json", "training_loss.png", "README.md", "run.json",
    }  # fmt: skip
    assert (done.exit_code, end.state()["state"], end.state()["steps"]) == (0, "finished", 3)
    assert done.summary == f"done: 3 steps, train_loss 1.2500, eval_loss 0.5000; in {end.folder}"
    everything = json.loads((end.folder / "all_results.json").read_text())
    assert everything == done.metrics == {**result().metrics, **(result().evaluation or {})}


@pytest.mark.parametrize("fails_at", [0, 1])
@pytest.mark.parametrize("error", [FULL_DISK, OSError(errno.EIO, "I/O error"), RuntimeError("I/O error: os error 28")])
def test_weights_that_cannot_be_written_leave_the_old_ones_and_name_what_is_safe(end, fails_at, error):
    (end.folder / "adapter_model.safetensors").write_bytes(b"old weights")
    checkpoint = end.folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    seal(checkpoint, {"run_id": "r", "step": 2})
    end.files.fails_at, end.files.error = fails_at, error
    with pytest.raises(SaveError, match=r"checkpoint-2 is the newest that could be saved"):
        end.write(result())
    assert end.names() == {"adapter_model.safetensors", "checkpoint-2"}  # and no half file that fills the disk
    assert (end.folder / "adapter_model.safetensors").read_bytes() == b"old weights"


def test_without_a_checkpoint_it_says_that_nothing_is_safe(end):
    end.files.fails_at = 0
    with pytest.raises(SaveError, match="no checkpoint was written either") as raised:
        end.write(result())
    assert raised.value.exit_code == 74


def test_a_mistake_of_ours_is_not_called_a_full_disk(end):
    end.files.fails_at, end.files.error = 1, KeyError("weight")
    with pytest.raises(KeyError):
        end.write(result())
    assert end.names() == set()


@pytest.mark.parametrize("error", [ValueError("layout"), ImportError("no matplotlib"), OSError(errno.ENOSPC, "full")])
def test_a_curve_that_cannot_be_drawn_costs_a_warning(end, monkeypatch, capsys, error):
    def fails(path: Path, *rest: Any) -> Path:
        path.write_bytes(b"half a picture")
        raise error

    monkeypatch.setattr(plot, "_draw", fails)
    assert end.write(result()).exit_code == 0
    assert "training_loss.png cannot be drawn" in capsys.readouterr().err
    assert end.state()["state"] == "finished"
    assert "training_loss.png" not in end.names()


@pytest.mark.parametrize("name", ["write_results", "write_model_card"])
def test_reports_that_cannot_be_written_end_with_74_and_whole_weights(end, monkeypatch, name):
    def fails(*args: Any) -> None:
        raise FULL_DISK

    monkeypatch.setattr(finish, name, fails)
    with pytest.raises(SaveError, match="the result could not be written"):
        end.write(result())
    assert (end.folder / "adapter_model.safetensors").read_bytes() == b"new weights"
    assert "run.json" not in end.names()  # it does not say finished


def test_a_checkpoint_that_could_not_be_saved_is_told_at_the_end_of_a_done_training(end):
    with pytest.raises(SaveError, match=r"checkpoint-3 could not.*Training is done, and the weights in .* are whole"):
        end.write(result(save_failure="checkpoint-3 could not be saved: full"))
    assert end.state()["state"] == "finished"


def best_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", *TRAINING_FILES}  # fmt: skip
    for name in names:
        (checkpoint / name).write_bytes(b"best")
    seal(checkpoint, {"run_id": "r", "step": 2})
    return checkpoint


@pytest.mark.parametrize("damage", ["", "cut", "gone"])
def test_the_best_weights_are_the_end_where_they_are_whole(tmp_path, capsys, damage):
    end = End(tmp_path, load_best_model_at_end=True, save_strategy="epoch", eval_strategy="epoch")
    checkpoint = best_checkpoint(end.folder)
    if damage == "cut":
        (checkpoint / "adapter_model.safetensors").write_bytes(b"be")
    best = {"step": 2 if damage != "gone" else 1, "values": {"eval_loss": 0.25}}
    done = end.write(result(state=state(best=best)))
    weights = (end.folder / "adapter_model.safetensors").read_bytes()
    if damage:
        assert weights == b"new weights"
        assert "held the best evaluation, but" in capsys.readouterr().err
        assert done.metrics["eval_loss"] == 0.5
        return
    assert weights == b"best"
    assert done.summary.endswith("weights of checkpoint-2")
    assert done.metrics["eval_loss"] == 0.25  # of these weights, not of the last ones
    assert {"MANIFEST.json", *TRAINING_FILES} & end.names() == {"trainer_state.json"}
    assert json.loads((end.folder / "trainer_state.json").read_text())["global_step"] == 3  # the run's, not a copy
    assert (end.folder / "tokenizer.json").read_bytes() == b"best"


def test_predictions_have_their_scores_in_every_report(end):
    end.predictions = Predicting()
    done = end.write(result())
    assert done.summary.startswith("done: 3 steps and predictions")
    predicted = json.loads((end.folder / "predict_results.json").read_text())
    assert predicted == {"predict_loss": 0.5, "predict_rouge-1": 50.0, "predict_runtime": 1.0}
    assert json.loads((end.folder / "eval_results.json").read_text())["eval_rouge-1"] == 50.0


def test_predictions_that_are_refused_cost_no_report(end):
    end.predictions = Predicting()
    end.predictions.found = ConfigError(Problem(key="output_dir", message="holds predictions of another run"))
    with pytest.raises(ConfigError, match="another run"):
        end.write(result())
    assert end.state()["state"] == "finished"
    assert "eval_results.json" in end.names()


def test_a_full_disk_under_predictions_is_a_save_that_failed(end):
    end.predictions = Predicting()
    end.predictions.found = FULL_DISK
    with pytest.raises(SaveError):
        end.write(result())


def test_a_signal_while_predictions_are_written_is_an_interrupted_run(end):
    end.predictions = Predicting()
    end.predictions.found = StopSignal(signal.SIGTERM)
    done = end.write(result())
    assert (done.exit_code, end.state()["state"]) == (143, "interrupted")
    with pytest.raises(StopSignal):
        end.write(None)  # nothing was trained


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("has_failed", [False, True])
@pytest.mark.parametrize("saved", [None, Path("out/checkpoint-3")])
def test_an_interrupted_run_says_what_is_saved(end, number, has_failed, saved):
    failure = "checkpoint-3 could not be saved: full" if has_failed else None
    done = end.write(result(stop_signal=int(number), last_checkpoint=saved, save_failure=failure))
    assert done.exit_code == (74 if has_failed else 130 if number == signal.SIGINT else 143)
    assert done.summary.startswith(f"stopped by {number.name} after step 3 of 4, ")
    assert ("could not be saved" in done.summary) is has_failed
    assert (str(saved) in done.summary) is (saved is not None)
    found = end.state()
    assert (found["state"], found["exit_code"], found["summary"]) == ("interrupted", done.exit_code, done.summary)
    assert end.names() == {"run.json"}  # no final weights beside a checkpoint that goes on


@pytest.mark.parametrize(
    ("train", "text"),
    [({}, "the same command continues"), ({"save_only_model": True}, "weights only, so it cannot be continued"),
     ({"overwrite_output_dir": True}, "the same command with resume_from_checkpoint=true continues")],
)  # fmt: skip
def test_an_interrupted_run_says_how_it_goes_on(tmp_path, train, text):
    end = End(tmp_path, **train)
    assert text in end.write(result(stop_signal=2, last_checkpoint=Path("c"))).summary


def test_an_evaluation_alone_writes_its_results_only(end):
    end.predictions = Predicting()
    done = end.write(None)
    assert done.summary.startswith("done: evaluation and predictions")
    assert end.names() == {"eval_results.json", "predict_results.json", "all_results.json"}


def test_other_ranks_write_nothing(end):
    end.accelerator.is_main_process = False
    end.files.fails_at = 0
    assert end.write(result()).exit_code == 0
    assert end.names() == set()


@pytest.mark.parametrize(
    ("error", "state", "key", "text"),
    [
        (
            LlamaFactoryError("at https://me:secret@hub/x hf_" + "a1B2" * 8),
            "failed",
            "error",
            "https://********@hub/x",
        ),
        (KeyboardInterrupt(), "failed", "error", "KeyboardInterrupt: "),
        (StopSignal(signal.SIGTERM), "interrupted", "summary", "stopped by SIGTERM before the first step"),
    ],
)
def test_why_a_run_ended_is_written_down_without_secrets(end, error, state, key, text):
    closed: list[str] = []
    end.accelerator.trackers = [
        SimpleNamespace(finish=lambda: 1 / 0), SimpleNamespace(finish=lambda: closed.append("second")),
    ]  # fmt: skip
    with pytest.raises(type(error)), end.record.closing(end.accelerator):
        raise error
    found = end.state()
    assert found["state"] == state
    assert text in found[key]
    assert "secret" not in json.dumps(found)
    assert "a1B2" not in json.dumps(found)
    assert closed == ["second"]  # a tracker that fails keeps no other one open


def test_a_record_that_cannot_be_written_hides_no_error(end, capsys):
    (end.folder / "run.json").mkdir()  # nothing can be renamed onto it
    with pytest.raises(ZeroDivisionError), end.record.closing(end.accelerator):
        raise ZeroDivisionError
    assert "run.json cannot be written" in capsys.readouterr().err
    assert [name for name in end.names() if name.startswith(".")] == []


def test_what_a_checkpoint_knows_of_its_run_follows_from_the_configuration(end):
    document = {
        **end.record.document,
        "config": {"b": 1, "a": [2]},
        "data": {"datasets": [{"name": "x", "fingerprint": "f"}]},
    }
    facts = replace(end.record, document=document).facts()
    other = replace(end.record, document={**document, "config": {"a": [2], "b": 1}}).facts()
    changed = replace(end.record, document={**document, "config": {"a": [2], "b": 2}}).facts()
    assert facts == other
    assert facts["config_sha256"] != changed["config_sha256"]
    assert facts["data"] == {"x": "f"}


def test_the_final_save_is_a_place_for_faults(end, monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "final:*:enospc")
    monkeypatch.setattr(os, "write", lambda *args: 0)
    with pytest.raises(SaveError):
        end.write(result())
