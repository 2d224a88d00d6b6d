"""Rules across options that need no file and no hardware: each is one small function, RunConfig -> problems.

A rule names the key that the user should change. `resolve` adds where it was set and what was given.
"""

from __future__ import annotations

from collections.abc import Iterator

from llamafactory.extras.errors import Problem
from llamafactory.extras.packages import is_installed
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.run_config import RunConfig

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "clearml": "clearml",
    "aim": "aim",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""Name in `report_to` -> package on PyPI."""


def check_required(config: RunConfig) -> Iterator[Problem]:
    """Keys without which a command cannot start."""
    if not config.model.model_name_or_path:
        yield Problem(
            key="model_name_or_path",
            message="missing",
            allowed="a folder with a model, or a hub id",
            fix=f"model_name_or_path: {DEFAULT_MODEL}",
        )
    if config.command == "export" and not config.export.export_dir:
        yield Problem(key="export_dir", message="missing", allowed="a folder", fix="export_dir: merged")
    if config.command != "train":
        return
    if not (config.train.do_train or config.train.do_eval or config.train.do_predict):
        yield Problem(
            key="do_train", message="nothing to do: do_train, do_eval and do_predict are off", fix="do_train: true"
        )
    if not config.train.output_dir:
        yield Problem(key="output_dir", message="missing", allowed="a folder", fix="output_dir: saves/my-run")


def check_data_for_training(config: RunConfig) -> Problem | None:
    """Training needs rows."""
    if config.command != "train" or not config.train.do_train or config.data.dataset or config.data.tokenized_path:
        return None
    return Problem(
        key="dataset",
        message="do_train is on, but there is no data set to train on",
        allowed="names of entries in dataset_info.json, with commas between them",
        fix="dataset: NAME",
    )


def check_data_to_look_at(config: RunConfig) -> Problem | None:
    """The commands data and score look at rows."""
    is_there = config.data.dataset or (config.command == "data" and config.data.eval_dataset)
    if config.command not in ("data", "score") or is_there:
        return None
    return Problem(
        key="dataset",
        message="missing",
        allowed="names of entries in dataset_info.json, or the path of a data file",
        fix="dataset: NAME",
    )


def check_data_for_evaluation(config: RunConfig) -> Problem | None:
    """Evaluation needs rows too."""
    train = config.train
    wanted = [key for key in ("do_eval", "do_predict", "eval_on_start") if getattr(train, key)]
    wanted += ["eval_strategy"] if train.eval_strategy != "no" else []
    if config.command != "train" or not wanted or config.data.eval_dataset or config.data.val_size > 0:
        return None
    return Problem(
        key=wanted[0],
        message="there are no rows to evaluate on",
        fix="val_size: 0.1 holds out a tenth of the data set; or set eval_dataset; or leave this key out",
    )


def check_best_evaluation(config: RunConfig) -> Iterator[Problem]:
    """The best evaluation needs evaluations."""
    train = config.train
    if config.command != "train" or not train.do_train or train.eval_strategy != "no":
        return
    for key in ("load_best_model_at_end", "early_stopping_steps"):
        if getattr(train, key):
            yield Problem(key=key, message="there is no evaluation while training", fix="eval_strategy: epoch")


def check_val_size(config: RunConfig) -> Problem | None:
    """`val_size` holds rows out of `dataset`; it cannot be combined with `eval_dataset`."""
    size = config.data.val_size
    if size == 0:
        return None
    if not config.data.dataset:
        return Problem(
            key="val_size", message="there is no data set to hold rows out of", fix="set dataset, or remove val_size"
        )
    if config.data.eval_dataset:
        return Problem(key="val_size", message="cannot be combined with eval_dataset", fix="remove one of the two")
    if size > 1 and not size.is_integer():
        return Problem(
            key="val_size", message="neither a share nor a whole number of rows", allowed="below 1, or a whole number"
        )
    return None


def check_streaming(config: RunConfig) -> Iterator[Problem]:
    """A stream has no length, so steps and held-out rows are counts."""
    if not config.data.streaming or config.command != "train" or not config.train.do_train:
        return
    if config.train.max_steps <= 0:
        yield Problem(
            key="max_steps", message="streaming has no number of rows to count epochs by", fix="max_steps: 1000"
        )
    if 0 < config.data.val_size < 1:
        yield Problem(
            key="val_size",
            given=f"{config.data.val_size:g}",
            message="streaming has no number of rows to take a share of",
            allowed="a whole number of rows",
        )
    if config.data.tokenized_path is not None:
        yield Problem(
            key="tokenized_path",
            given=config.data.tokenized_path,
            message="streaming tokenises rows when their step comes, and keeps none of them",
            allowed="nothing, with streaming: true",
            fix="leave tokenized_path out, or set streaming: false to use the rows in it",
        )
    if config.train.stage not in ("pt", "sft", "rm", "dpo"):
        yield Problem(
            key="streaming",
            message=f"not for stage {config.train.stage}, which looks at all rows before it starts",
            fix="streaming: false; max_samples uses a part of a large data set",
        )


def check_mix(config: RunConfig) -> Problem | None:
    """`interleave_probs` has one share for each data set."""
    probs, names = config.data.interleave_probs, config.data.dataset
    if not probs or config.data.mix_strategy == "concat" or len(names) < 2:
        return None
    given = ", ".join(f"{prob:g}" for prob in probs)
    if len(probs) != len(names):
        return Problem(
            key="interleave_probs",
            given=given,
            message=f"{len(probs)} shares for {len(names)} data sets",
            allowed=f"one share for each of {', '.join(names)}",
        )
    if min(probs) < 0 or sum(probs) <= 0 or sum(probs) == float("inf"):
        return Problem(key="interleave_probs", given=given, message="not shares", allowed="numbers from 0 up")
    if min(probs) == 0 and config.data.mix_strategy != "interleave_under":
        name = names[probs.index(0)]
        return Problem(
            key="interleave_probs",
            given=given,
            message=f"'{name}' would never run out with {config.data.mix_strategy}",
            allowed="shares above 0",
            fix=f"remove {name} from dataset, or use interleave_under",
        )
    return None


def check_loss_mask(config: RunConfig) -> Iterator[Problem]:
    """Loss on prompts and loss on some answers only exclude each other, and there is one choice of answers."""
    data = config.data
    if data.mask_history and data.train_on not in (None, "last"):
        yield Problem(key="train_on", message="mask_history means train_on: last", fix="remove one of the two")
    elif data.answers_trained != "all" and data.train_on_prompt:
        key = "mask_history" if data.mask_history else "train_on"
        yield Problem(key=key, message="cannot be combined with train_on_prompt", fix="remove one of the two")


def check_sft_only(config: RunConfig) -> Iterator[Problem]:
    """Options of supervised fine-tuning beside another stage."""
    if config.train.stage == "sft" or config.command != "train":
        return
    for key in ("train_on_prompt", "mask_history", "train_on", "neat_packing"):
        if getattr(config.data, key):
            yield Problem(key=key, message=f"only for stage sft, not {config.train.stage}", fix="remove this key")


def check_packing(config: RunConfig) -> Problem | None:
    """`neat_packing` turns packing on, so packing cannot be off beside it."""
    if config.data.neat_packing and config.data.packing is False:
        return Problem(key="packing", message="is off, but neat_packing is on", fix="remove one of the two")
    return None


def check_label_smoothing(config: RunConfig) -> Problem | None:
    """Only the sigmoid loss has a conservative form."""
    options = config.stage_options
    if getattr(options, "dpo_label_smoothing", 0.0) == 0.0 or getattr(options, "pref_loss", "") == "sigmoid":
        return None
    return Problem(key="dpo_label_smoothing", message="only for pref_loss sigmoid", fix="pref_loss: sigmoid, or 0")


def check_sft_losses(config: RunConfig) -> Problem | None:
    """At most one variant of the supervised loss; asft holds dft already."""
    names = ("use_dft_loss", "use_asft_loss", "use_eaft_loss")
    wanted = [name for name in names if getattr(config.stage_options, name, False)]
    if len(wanted) < 2:
        return None
    return Problem(key=wanted[-1], message=f"cannot be combined with {wanted[0]}", fix="keep one of them")


def check_rewards(config: RunConfig) -> Iterator[Problem]:
    """A stage that samples answers needs something that scores them, and log-probabilities that can be computed."""
    options = config.stage_options
    if config.command != "train" or not hasattr(options, "reward_functions"):
        return
    if not getattr(options, "reward_functions", ()) and getattr(options, "reward_model", None) is None:
        yield Problem(
            key="reward_model" if config.train.stage == "ppo" else "reward_functions",
            message=f"stage {config.train.stage} needs something that scores answers",
            allowed="reward_functions, reward_model, or both",
            fix="reward_functions: rewards.py:score, or a built-in check such as json",
        )
    model, kind = getattr(options, "reward_model", None), getattr(options, "reward_model_type", "")
    is_address = str(model).startswith(("http://", "https://"))
    if model is not None and is_address != (kind == "api"):
        yield Problem(
            key="reward_model_type",
            message="a URL is a service" if is_address else "a service has a URL",
            allowed="api with an http address; lora or full with a folder",
            fix="reward_model_type: api" if is_address else "reward_model: https://...",
        )
    if config.generation.num_beams > 1:
        yield Problem(key="num_beams", message="answers are sampled, not searched for", fix="num_beams: 1")
    if config.generation.repetition_penalty != 1.0:
        yield Problem(
            key="repetition_penalty",
            message="the tokens would not be those of the policy that is trained",
            fix="repetition_penalty: 1.0",
        )
    if config.data.streaming:
        yield Problem(key="streaming", message="prompts of rollouts are drawn from all rows", fix="streaming: false")
    if not config.generation.do_sample:
        yield Problem(key="do_sample", message="answers that are all the same teach nothing", fix="do_sample: true")


def check_precision(config: RunConfig) -> Iterator[Problem]:
    """At most one precision."""
    train = config.train
    if train.bf16 and train.fp16:
        yield Problem(key="fp16", message="cannot be combined with bf16", fix="keep bf16 where the device has it")
    if train.pure_bf16 and train.fp16:
        yield Problem(key="fp16", message="cannot be combined with pure_bf16", fix="remove one of the two")
    if train.use_cpu and train.fp16:
        yield Problem(
            key="fp16", message="float16 training needs a GPU, and use_cpu is on", fix="use bf16, or neither"
        )


def check_steps(config: RunConfig) -> Iterator[Problem]:
    """Step counts are whole numbers, or shares below 1."""
    for key in ("save_steps", "eval_steps", "logging_steps", "warmup_steps"):
        value = getattr(config.train, key)
        if value is not None and value >= 1 and not float(value).is_integer():
            yield Problem(
                key=key, message="neither a share nor a whole number of steps", allowed="below 1, or a whole number"
            )


def check_schedule(config: RunConfig) -> Iterator[Problem]:
    """Schedules that need arguments, and arguments that no schedule reads."""
    kind, kwargs = config.train.lr_scheduler_type, config.train.lr_scheduler_kwargs or {}
    needed = {
        "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
        "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    }.get(kind, ())
    if needed and not any(name in kwargs for name in needed):
        yield Problem(
            key="lr_scheduler_kwargs",
            message=f"lr_scheduler_type {kind} needs {' or '.join(needed)}",
            fix="lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        )
    if config.train.warmup_steps and config.train.max_steps > 0 and config.train.warmup_steps > config.train.max_steps:
        yield Problem(
            key="warmup_steps",
            message=f"longer than the run of {config.train.max_steps} steps",
            fix="a value below 1 is a share of all steps",
        )


def check_adapters(config: RunConfig) -> Problem | None:
    """Adapters belong to LoRA training."""
    if config.train.finetuning_type == "full" and config.model.adapter_name_or_path:
        return Problem(
            key="adapter_name_or_path",
            message="cannot be combined with finetuning_type full",
            fix="finetuning_type: lora; to train all weights, export the adapter into the model first",
        )
    return None


def check_trackers(config: RunConfig) -> Iterator[Problem]:
    """Trackers that are unknown, or whose package is missing."""
    if config.command != "train":
        return
    for name in config.train.report_to:
        if name == "none":
            if len(config.train.report_to) > 1:
                yield Problem(key="report_to", message="none stands beside other trackers", fix="remove none")
        elif name not in TRACKERS:
            allowed = ", ".join(["none", *TRACKERS])
            yield Problem(
                key="report_to", message=f"unknown tracker '{name}'", allowed=allowed, fix=did_you_mean(name, TRACKERS)
            )
        elif install := _install_command(name, TRACKERS[name]):
            yield Problem(key="report_to", message=f"the package for {name} is not installed", fix=install)


def check_packages(config: RunConfig) -> Iterator[Problem]:
    """Packages that an option needs."""
    if config.model.flash_attn == "fa2" and (install := _install_command("flash_attn", "flash-attn")):
        yield Problem(key="flash_attn", message="fa2 needs flash-attn", fix=f"{install}; or flash_attn: auto")
    if config.model.flash_attn == "fa3" and (install := _install_command("flash_attn_interface", "flash-attn-3")):
        yield Problem(key="flash_attn", message="fa3 needs flash-attn 3", fix=f"{install}; or flash_attn: auto")
    if config.train.plot_loss and (install := _install_command("matplotlib", "matplotlib")):
        yield Problem(key="plot_loss", message="needs matplotlib", fix=install)


def _install_command(module: str, package: str) -> str | None:
    return None if is_installed(module) else f"pip install {package}"


CHECKS = (
    check_required,
    check_data_for_training,
    check_data_to_look_at,
    check_data_for_evaluation,
    check_best_evaluation,
    check_val_size,
    check_mix,
    check_streaming,
    check_loss_mask,
    check_sft_only,
    check_packing,
    check_label_smoothing,
    check_sft_losses,
    check_rewards,
    check_precision,
    check_steps,
    check_schedule,
    check_adapters,
    check_trackers,
    check_packages,
)
