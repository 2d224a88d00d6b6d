"""The end of a run: final weights, evaluation, results, curves, model card, and a last line that is true."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState

from llamafactory.extras import log
from llamafactory.extras.files import fsync, write_json
from llamafactory.train.build import require_trainable, trainable_report
from llamafactory.train.loop import evaluate
from llamafactory.train.output_dir import RUN_FILE, Claim, clear_replaced_run
from llamafactory.train.plot import plot_curves
from llamafactory.train.report import RunResult, run_record, write_model_card, write_results

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from llamafactory.data.pipeline import PreparedData
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.loop import FitResult, Job


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
            num_processes=num_processes,
            trainable_parameters=trained,
            total_parameters=total,
        )
        record = cls(path=claim.output_dir / RUN_FILE, document=document, is_training=cfg.train.do_train)
        if log.is_main_process() and cfg.train.do_train:
            clear_replaced_run(claim)
            record.write("running")
        return record

    def write(self, state: str, **more: Any) -> None:
        """Writes the record with its current state."""
        write_json(self.path, {**self.document, **more, "state": state})

    @contextmanager
    def closing(self, accelerator: Accelerator) -> Iterator[None]:
        """Marks the run as failed where it ends with an error, and closes trackers and process groups."""
        try:
            yield
        except BaseException as error:
            if accelerator.is_main_process and self.is_training:
                self.write("failed", error=f"{type(error).__name__}: {str(error)[:500]}")
            raise
        finally:
            accelerator.end_training()
            _forget_accelerator()


def _forget_accelerator() -> None:
    """Lets a second run in this process choose its own precision and device; accelerate keeps them for good."""
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


def write_outcome(cfg: RunConfig, job: Job, record: RunRecord, result: FitResult | None) -> RunResult:
    """Writes everything that belongs into the output folder and says how the run ended.

    Args:
        cfg: the resolved configuration.
        job: of the run.
        record: its `run.json`.
        result: of the loop, or None where nothing was trained.
    """
    if result is not None and result.stop_signal:
        return _interrupted(job, record, result)
    metrics: dict[str, float] = dict(result.metrics) if result else {}
    if result is not None and job.accelerator.is_main_process:
        _write_final_weights(job)
        write_results(job.output_dir, "train", metrics)
    evaluation = (result.evaluation if result else None) or evaluate(job)
    metrics |= evaluation
    if job.accelerator.is_main_process:
        _write_reports(cfg, job, record, result, metrics, evaluation)
    job.accelerator.wait_for_everyone()
    done = f"done: {result.state.step} steps" if result else "done: evaluation"
    figures = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key.endswith("loss"))
    summary = f"{done}, {figures}; in {job.output_dir}"
    log.info(summary)
    return RunResult(output_dir=job.output_dir, metrics=metrics, exit_code=0, summary=summary)


def _write_final_weights(job: Job) -> None:
    """Writes beside, then moves file by file, so that no file in the folder is ever half."""
    staging = job.output_dir / f".staging-final-{os.getpid()}"
    staging.mkdir()
    job.write_model(staging)
    for path in sorted(staging.iterdir()):
        fsync(path)
        path.replace(job.output_dir / path.name)
    staging.rmdir()


def _write_reports(
    cfg: RunConfig,
    job: Job,
    record: RunRecord,
    result: FitResult | None,
    metrics: dict[str, float],
    evaluation: dict[str, float],
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
    write_model_card(folder, cfg, record.document, metrics)
    record.write("finished", metrics=metrics, steps=state.step)


def _interrupted(job: Job, record: RunRecord, result: FitResult) -> RunResult:
    name = signal.Signals(result.stop_signal).name
    how = "the same command" + (" with resume_from_checkpoint=true" if job.cfg.overwrite_output_dir else "")
    then = "weights only, so it cannot be continued" if job.cfg.save_only_model else f"{how} continues"
    saved = result.last_checkpoint
    where = f"saved in {saved}; {then}" if saved else "nothing new to save"
    summary = f"stopped by {name} after step {result.state.step} of {job.total_steps}, {where}"
    if job.accelerator.is_main_process:
        record.write("interrupted", steps=result.state.step, summary=summary)
    log.info(summary)
    return RunResult(
        output_dir=job.output_dir, metrics=result.metrics, exit_code=128 + result.stop_signal, summary=summary
    )
