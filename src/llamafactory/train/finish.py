"""The end of a run: final weights, evaluation, results, curves, model card, and a last line that is true."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState

from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import LlamaFactoryError, SaveError
from llamafactory.extras.files import fsync, write_json
from llamafactory.extras.secrets import mask_text
from llamafactory.model.fingerprint import base_fingerprint
from llamafactory.model.shards import WEIGHT_SHARDS, read_whole
from llamafactory.train import memory_use
from llamafactory.train.build import require_trainable, trainable_report
from llamafactory.train.checkpoint.folders import checkpoint_name, list_checkpoints
from llamafactory.train.checkpoint.manifest import MANIFEST, find_fault
from llamafactory.train.checkpoint.room import require_disk
from llamafactory.train.checkpoint.saver import is_disk_fault
from llamafactory.train.checkpoint.snapshot import TRAINING_FILES
from llamafactory.train.evaluation import evaluate
from llamafactory.train.origin import origin
from llamafactory.train.output_dir import RUN_FILE, Claim, clear_replaced_run
from llamafactory.train.plot import plot_curves
from llamafactory.train.predictions_file import NAME
from llamafactory.train.readings import read_run
from llamafactory.train.report import RunResult, run_record, write_model_card, write_results
from llamafactory.train.signals import EXIT_NOT_SAVED, StopSignal, exit_code_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from llamafactory.data.pipeline import PreparedData
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.job import FitResult, Job
    from llamafactory.train.start_up import StartUp


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json` of this run: written at the start, and again with the truth at the end."""

    path: Path
    document: dict[str, Any]
    is_training: bool

    @classmethod
    def start(
        cls,
        cfg: RunConfig,
        claim: Claim,
        *,
        plan: ModelPlan,
        data: PreparedData,
        policy: nn.Module,
        num_processes: int,
        text: Mapping[str, str],
    ) -> RunRecord:
        """Says what is trained, removes the run that is replaced, and writes the first record."""
        trained, total, kinds = trainable_report(policy)
        if cfg.train.do_train:
            require_trainable(trained)
            log.info(f"trainable: {trained:,} of {total:,} parameters ({trained / total:.2%}) in {kinds}")
        if cfg.model.print_param_status:
            for name, parameter in policy.named_parameters():
                log.info(f"{name}: {parameter.dtype}, {parameter.device}, trained: {parameter.requires_grad}")
        document = run_record(
            cfg,
            run_id=claim.run_id,
            state="running",
            plan=plan.to_dict(),
            data=data.report.to_dict(),
            base=base_fingerprint(cfg.model),
            text=dict(text),
            num_processes=num_processes,
            times_continued=claim.times_continued,
            trainable_parameters=trained,
            total_parameters=total,
        )
        record = cls(path=claim.output_dir / RUN_FILE, document=document, is_training=cfg.train.do_train)
        if log.is_main_process() and cfg.train.do_train:
            require_disk(claim.output_dir, cfg.train, policy)
            clear_replaced_run(claim)
            record.write("running")
        return record

    def write(self, state: str, **more: Any) -> None:
        """Writes the record with its current state."""
        write_json(self.path, {**self.document, **origin(), **more, "state": state})

    def note_start_up(self, start: StartUp) -> None:
        """Keeps the parts of the start for the next time that the record is written, and says them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start.ended("first step")
        self.document["start_up"] = start.to_dict()
        log.info(start.line())

    def facts(self) -> dict[str, Any]:
        """What every checkpoint says of its run, in its manifest."""
        datasets = self.document["data"].get("datasets", [])
        config = json.dumps(self.document["config"], sort_keys=True)
        return {
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "data": {one["name"]: one.get("fingerprint") for one in datasets},
            "num_processes": self.document["num_processes"],
            "times_continued": self.document["times_continued"],
            "packages": self.document["packages"],
        }

    @contextmanager
    def closing(self, accelerator: Accelerator) -> Iterator[None]:
        """Marks the run as failed where it ends with an error, and closes trackers and process groups."""
        try:
            yield
        except StopSignal as stopped:
            summary = f"{stopped} before the first step of this process"
            self.write_end(accelerator, summary, state="interrupted", key="summary")
            raise
        except BaseException as error:
            self.write_end(accelerator, f"{type(error).__name__}: {mask_text(str(error))[:500]}")
            raise
        finally:
            _close_trackers(accelerator)
            _forget_accelerator()

    def write_end(self, accelerator: Accelerator, why: str, *, state: str = "failed", key: str = "error") -> None:
        """Writes down why a run of this rank ended; never raises."""
        if not (accelerator.is_main_process and self.is_training):
            return
        try:
            self.write(state, **{key: why})
        except OSError as fault:  # the error that ended the run is the one to show
            log.warn(f"{self.path} cannot be written: {fault}")


def _close_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # third-party code on a network, after the work is done
            log.warn(f"a tracker could not be closed ({type(error).__name__}: {error})")


def _forget_accelerator() -> None:
    """Lets a second run in this process choose its own precision and device; accelerate keeps them for good.

    The processes stay connected until they end: another run finds the connection, and could not make it again, because
    the store through which they met still holds the answers of the first time.
    """
    if torch.distributed.is_initialized():
        atexit.unregister(_disconnect)
        atexit.register(_disconnect)
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_outcome(
    cfg: RunConfig, job: Job, record: RunRecord, result: FitResult | None, plan: ModelPlan, peak: memory_use.Peak
) -> RunResult:
    """Writes everything that belongs into the output folder and says how the run ended.

    Args:
        cfg: the resolved configuration.
        job: of the run.
        record: its `run.json`.
        result: of the loop, or None where nothing was trained.
        plan: of the run; its forecast is compared with the real peak of memory.
        peak: of memory, since the run began.
    """
    if result is not None and result.stop_signal:
        return _interrupted(job, record, result)
    metrics: dict[str, float] = dict(result.metrics) if result else {}
    job.accelerator.wait_for_everyone()  # the first process may still have been writing the last checkpoint
    best = _best_folder(job, result)
    write: Any = None
    if result is not None and best is None:
        write = job.model_files.prepare(is_async=False, is_writer=job.accelerator.is_main_process)
    with _saving(job):
        if result is not None and job.accelerator.is_main_process:
            _write_final_weights(job, best, write)
            write_results(job.output_dir, "train", metrics)
    try:
        predicted, evaluation, refused = _predict_if_possible(job, _last_evaluation(job, result, best))
    except StopSignal as stopped:
        if result is None:
            raise
        return _interrupted(job, record, replace(result, stop_signal=stopped.number))
    metrics |= evaluation | predicted
    memory = memory_use.compare(plan, peak) if result else None
    with _saving(job):
        if job.accelerator.is_main_process:
            if predicted:
                write_results(job.output_dir, "predict", predicted)
            _write_reports(cfg, job, record, result, metrics, evaluation, memory)
    job.accelerator.wait_for_everyone()
    _raise(refused)
    done = f"done: {result.state.step} steps" if result else "done: evaluation"
    done += " and predictions" if predicted else ""
    if result and result.stopped_early:
        done += f" of {job.total_steps}, stopped early: {result.stopped_early} evaluations in a row were no better"
    figures = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key.endswith("loss"))
    said = (f"{done}, {figures}" if figures else done) + memory_use.compare_line(memory)
    summary = f"{said}; in {job.output_dir}" + (f", weights of {best.name}" if best else "")
    log.info(summary)
    if result and result.save_failure:
        raise SaveError(f"{result.save_failure}. Training is done, and the weights in {job.output_dir} are whole")
    return RunResult(output_dir=job.output_dir, metrics=metrics, exit_code=0, summary=summary)


@contextmanager
def _saving(job: Job) -> Iterator[None]:
    """Turns a full or broken disk at the end of a run into an honest end."""
    try:
        failpoints.visit("final")
        yield
    except Exception as error:
        if not is_disk_fault(error):
            raise
        saved = [path.name for path in list_checkpoints(job.output_dir)]
        safe = (
            f"{job.output_dir / saved[-1]} is the newest that could be saved"
            if saved
            else "no checkpoint was written either"
        )
        raise SaveError(f"the result could not be written to {job.output_dir}: {error}; {safe}") from error


def _best_folder(job: Job, result: FitResult | None) -> Path | None:
    """The checkpoint of the best evaluation, where the run shall end with it; a missing one is worth a warning."""
    if result is None or not job.cfg.load_best_model_at_end or not result.state.best:
        return None
    folder = job.output_dir / checkpoint_name(result.state.best["step"])
    fault = find_fault(folder) if folder.is_dir() else "it is gone"
    if fault is None:
        return folder
    log.warn(f"{folder} held the best evaluation, but {fault}: the run ends with the last weights")
    return None


def _last_evaluation(job: Job, result: FitResult | None, best: Path | None) -> dict[str, float]:
    """What the weights that the run ends with reach; they are not evaluated twice."""
    if result is not None and best is not None:
        return dict(result.state.best["values"])
    writes = job.predictions is not None and job.predictions.is_written  # scores come with the file
    return (result.evaluation if result else None) or evaluate(job, generates=not writes)


def _predict_if_possible(
    job: Job, evaluation: dict[str, float]
) -> tuple[dict[str, float], dict[str, float], LlamaFactoryError | None]:
    """As `_predict`; and what keeps it from its work, such as predictions of another run, which costs no report."""
    try:
        return *_predict(job, evaluation), None
    except SaveError:
        raise
    except LlamaFactoryError as error:
        return {}, evaluation, error


def _raise(error: LlamaFactoryError | None) -> None:
    if error is not None:
        raise error


def _predict(job: Job, evaluation: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Writes the predictions of the final weights.

    Returns:
        What the prediction found, under names that begin with `predict_`: the evaluation's figures, which are of the
        same rows and weights, and the scores of what was written; and the evaluation with those scores.
    """
    if job.predictions is None or not job.predictions.is_written:
        return {}, evaluation
    with _saving(job):
        found = job.predictions.write(job.output_dir)
    scores = {name: value for name, value in found.items() if name.startswith("eval")}
    if scores:
        figures = ", ".join(f"{name.partition('_')[2]} {value:.2f}" for name, value in scores.items())
        log.info(f"predictions: {figures}")
    evaluation = evaluation | scores
    rates = ("_runtime", "_per_second")
    same = {name: value for name, value in evaluation.items() if not name.endswith(rates)}
    predicted = {f"predict{name.removeprefix('eval')}": value for name, value in same.items()}
    return predicted | {name: value for name, value in found.items() if name.startswith("predict_")}, evaluation


def _write_final_weights(job: Job, best: Path | None, write: Callable[[Path], None] | None) -> None:
    """Writes beside, then moves file by file, so that no file in the folder is ever half."""
    staging = job.output_dir / f".staging-final-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        if write is not None:
            write(staging)
        elif best is not None:
            for path in sorted(best.iterdir()):
                if path.name == WEIGHT_SHARDS:
                    job.model_files.write_whole(staging, read_whole(path))
                elif path.name not in {MANIFEST, *TRAINING_FILES}:
                    shutil.copyfile(path, staging / path.name)
        for path in sorted(staging.iterdir()):
            fsync(path)
        for path in sorted(staging.iterdir()):
            path.replace(job.output_dir / path.name)
        fsync(job.output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk has no room for what is half


def _write_reports(
    cfg: RunConfig,
    job: Job,
    record: RunRecord,
    result: FitResult | None,
    metrics: dict[str, float],
    evaluation: dict[str, float],
    memory: dict[str, int] | None,
) -> None:
    folder = job.output_dir
    if evaluation:
        write_results(folder, "eval", evaluation)
    if result is None:
        return
    state = result.state
    write_json(
        folder / "trainer_state.json",
        {
            "global_step": state.step,
            "epoch": state.epoch,
            "max_steps": job.total_steps,
            "log_history": state.log_history,
        },
    )
    if cfg.train.plot_loss:
        for path in plot_curves(folder, state.log_history):
            log.info(f"curve: {path}")
    readings = read_run(state.log_history)
    write_model_card(folder, cfg, record.document, metrics, readings)
    for sentence in readings:
        log.note(sentence)
    record.write("finished", metrics=metrics, steps=state.step, readings=readings, memory=memory)


def _interrupted(job: Job, record: RunRecord, result: FitResult) -> RunResult:
    name = signal.Signals(result.stop_signal).name
    how = "the same command" + (" with resume_from_checkpoint=true" if job.cfg.overwrite_output_dir else "")
    then = "weights only, so it cannot be continued" if job.cfg.save_only_model else f"{how} continues"
    saved = result.last_checkpoint
    where = f"saved in {saved}; {then}" if saved else "nothing new to save"
    if result.save_failure:
        where = result.save_failure + (f"; {saved} is whole" if saved else "")
    summary = f"stopped by {name} after step {result.state.step} of {job.total_steps}, {where}"
    code = EXIT_NOT_SAVED if result.save_failure else exit_code_of(result.stop_signal)
    if job.accelerator.is_main_process:
        try:
            record.write("interrupted", steps=result.state.step, summary=summary, exit_code=code)
        except OSError as error:
            log.warn(f"{record.path} cannot be written: {error}")
    log.info(summary)
    return RunResult(output_dir=job.output_dir, metrics=result.metrics, exit_code=code, summary=summary)


def stopped_before_training(output_dir: Path, stopped: StopSignal, resume_from: Path | None) -> RunResult:
    """The end of a run that a signal stopped before there was anything new to save."""
    kept = f"{resume_from} stays as it is" if resume_from else "nothing to save"
    summary = f"{stopped} before the first step, {kept}; the same command starts again"
    if (output_dir / NAME).is_file():
        summary += f", and goes on with {NAME} behind its last whole line"
    log.info(summary)
    return RunResult(output_dir=output_dir, metrics={}, exit_code=stopped.exit_code, summary=summary)
