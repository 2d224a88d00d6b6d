"""One run from configuration to files, top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamafactory.extras import log
from llamafactory.extras.network import go_offline
from llamafactory.train.output_dir import claim_output_dir, require_same_data

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.train.report import RunResult


def run_exp(cfg: RunConfig) -> RunResult:
    """Trains and evaluates as configured.

    Raises:
        LlamaFactoryError: configuration, data, model or output folder cannot be used; nothing was overwritten.
    """
    if cfg.model.offline:
        go_offline()
    claim = claim_output_dir(cfg)
    if claim.replaces and log.is_main_process():
        (claim.output_dir / "bad_rows.jsonl").unlink(missing_ok=True)
    log.info(f"output: {claim.output_dir}" + (f", continuing {claim.resume_from.name}" if claim.resume_from else ""))
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.extras.hardware import read_hardware
    from llamafactory.model.loader import load_model_config
    from llamafactory.model.plan import plan_training
    from llamafactory.train import build, finish
    from llamafactory.train.loop import fit
    from llamafactory.train.stage import load_stage

    tokenizer, template = build.load_text(cfg)
    data = prepare_data(
        cfg.data,
        template,
        tokenizer,
        view=load_stage(cfg.train.stage).view,
        seed=build.data_seed(cfg),
        for_training=cfg.train.do_train,
        output_dir=claim.output_dir if log.is_main_process() else None,
    )
    build.say_lines(data.report.lines())
    model_config = load_model_config(cfg.model)
    plan = plan_training(cfg, model_config, read_hardware(use_cpu=cfg.train.use_cpu))
    build.say_lines(plan.lines())
    accelerator = build.start_accelerator(cfg, plan)
    require_same_data(claim, data.report.to_dict(), accelerator.num_processes)
    policy = build.load_policy(cfg, plan, resume_from=claim.resume_from)
    record = finish.RunRecord.start(
        cfg, claim, plan=plan, data=data, policy=policy, num_processes=accelerator.num_processes
    )
    with record.closing(accelerator):
        job = build.assemble_job(
            cfg,
            claim,
            plan=plan,
            data=data,
            policy=policy,
            tokenizer=tokenizer,
            model_config=model_config,
            accelerator=accelerator,
        )
        result = fit(job) if cfg.train.do_train else None
        return finish.write_outcome(cfg, job, record, result)
