"""One run from configuration to files, top to bottom."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.extras import log
from llamafactory.extras.network import go_offline
from llamafactory.train.continuity import require_same_base, require_same_data, require_same_text, say_other_versions
from llamafactory.train.origin import as_it_began
from llamafactory.train.output_dir import claim_output_dir, make_writable
from llamafactory.train.run_lock import RunLock
from llamafactory.train.signals import StopRequest, StopSignal
from llamafactory.train.start_up import StartUp

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.train.output_dir import Claim
    from llamafactory.train.report import RunResult


def run_exp(cfg: RunConfig) -> RunResult:
    """Trains and evaluates as configured; one run at a time in an output folder.

    Raises:
        LlamaFactoryError: configuration, data, model or output folder cannot be used; nothing was overwritten.
    """
    if cfg.model.offline:
        go_offline()
    folder = Path(cfg.train.output_dir or "")
    claim = None
    with StopRequest(cfg.train.save_grace) as stop:
        try:
            make_writable(folder)
            with RunLock(folder) if log.is_main_process() else nullcontext():
                claim = claim_output_dir(cfg)
                with as_it_began(cfg, claim.record):
                    return _run(cfg, claim, stop)
        except StopSignal as stopped:
            from llamafactory.train.finish import stopped_before_training

            return stopped_before_training(folder, stopped, claim.resume_from if claim else None)


def _run(cfg: RunConfig, claim: Claim, stop: StopRequest) -> RunResult:
    if claim.replaces and log.is_main_process():
        (claim.output_dir / "bad_rows.jsonl").unlink(missing_ok=True)
    log.info(f"output: {claim.output_dir}" + (f", continuing {claim.resume_from.name}" if claim.resume_from else ""))
    start = StartUp()
    from llamafactory.data import cache_key
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.data.sources.access import access_of
    from llamafactory.data.stream_pipeline import prepare_stream
    from llamafactory.extras.hardware import read_hardware
    from llamafactory.model.fingerprint import base_fingerprint
    from llamafactory.model.loader import load_model_config
    from llamafactory.model.remedies import require_fit
    from llamafactory.train import build, finish, memory_use, planning, rerun, text
    from llamafactory.train.interruption import interruptible
    from llamafactory.train.likeness import agreed_split, facts_of, require_alike
    from llamafactory.train.loop import fit
    from llamafactory.train.predict_parts import prompts_of, with_predictions
    from llamafactory.train.rehearsal import needs_rehearsal, rehearse
    from llamafactory.train.report import package_versions
    from llamafactory.train.stage import load_stage
    from llamafactory.train.watchdog import watching

    peak = memory_use.Peak.begin()
    start.ended("imports")
    tokenizer, template = text.load_text(cfg)
    text_parts = cache_key.text_parts(tokenizer.backend_tokenizer, template)
    require_same_text(cfg, claim.output_dir, claim.record, text_parts)
    prepare = partial(prepare_data, for_training=cfg.train.do_train)
    if cfg.data.streaming and cfg.train.do_train:
        prepare = partial(prepare_stream, shuffle=not cfg.train.disable_shuffling)
    data = prepare(
        cfg.data,
        template,
        tokenizer,
        view=load_stage(cfg.train.stage).view,
        seed=text.data_seed(cfg),
        access=access_of(cfg.data, cfg.model),
        output_dir=claim.output_dir if log.is_main_process() else None,
        cache_dir=Path(cfg.model.cache_dir) if cfg.model.cache_dir else None,
    )
    prompts = prompts_of(cfg, template, tokenizer, data)
    stop.check()
    if cfg.train.rerun_of:
        may_differ = "data" in cfg.train.allow_change
        rerun.say_what_differs(cfg.train.rerun_of, data.report.to_dict(), package_versions(), may_differ=may_differ)
        rerun.require_recorded_base(cfg, base_fingerprint(cfg.model))
        rerun.say_other_text(cfg.train.rerun_of, text_parts)
    build.say_lines(data.report.lines())
    start.ended("rows")
    model_config = load_model_config(cfg.model)
    hardware = read_hardware(use_cpu=cfg.train.use_cpu)
    plan_again = planning.planner(model_config, hardware, data.train, mix=data.mix)
    plan = planning.keep_split(plan_again(cfg), claim.record, is_set=cfg.train.micro_batch_tokens is not None)
    build.say_lines(plan.lines())
    if cfg.train.do_train:
        require_fit(cfg, plan, hardware, plan_again)
    start.ended("plan")
    accelerator = build.start_accelerator(cfg, plan)
    require_alike(accelerator, facts_of(cfg, claim, data.report.to_dict(), plan))
    plan = agreed_split(accelerator, plan)
    require_same_data(cfg, claim.output_dir, claim.record, data.report.to_dict(), accelerator.num_processes)
    say_other_versions(claim.record, package_versions())
    if claim.record is not None and build.needs_base(cfg):
        require_same_base(cfg, claim.output_dir, claim.record, base_fingerprint(cfg.model))
    if cfg.train.rerun_of:
        rerun.say_what_is_computed_otherwise(cfg.train.rerun_of, plan.to_dict(), accelerator.num_processes)
    policy = build.load_policy(cfg, plan, resume_from=claim.resume_from)
    start.ended("model")
    record = finish.RunRecord.start(
        cfg, claim, plan=plan, data=data, policy=policy, num_processes=accelerator.num_processes, text=text_parts
    )
    watch = watching(accelerator, stop, partial(record.write_end, accelerator))
    with record.closing(accelerator), watch as dog, memory_use.explained(plan):
        job = build.assemble_job(
            cfg,
            claim,
            plan=plan,
            data=data,
            policy=policy,
            tokenizer=tokenizer,
            model_config=model_config,
            accelerator=accelerator,
            facts=record.facts(),
            template=template,
            first_step_is_over=partial(record.note_start_up, start),
        )
        job = with_predictions(
            job, cfg, claim, plan=plan, policy=policy, template=template, tokenizer=tokenizer, prompts=prompts,
            stop=stop,
        )  # fmt: skip
        if dog is not None:
            dog.doing = job.doing
        start.ended("optimizer")
        with interruptible(job, stop):
            if cfg.train.do_train:
                stop.defer()
                if needs_rehearsal(plan):
                    rehearse(job, plan)
            result = fit(job, stop) if cfg.train.do_train else None
            outcome = finish.write_outcome(cfg, job, record, result, plan, peak)
            stop.over(outcome.exit_code)
            return outcome
