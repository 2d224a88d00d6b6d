"""Which of the keys that a user set do nothing in this run, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.export import ExportConfig
from llamafactory.hparams.generation import GenerationConfig
from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig

_Rule: TypeAlias = tuple[Callable[[RunConfig], bool], Iterable[str], str]

_OPTIM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_SHARED_KEYS = {"stage", "finetuning_type", "seed", "use_cpu", "bf16", "fp16", "pure_bf16"}
CHAT_KEYS = {"template", "default_system", "enable_thinking", "preserve_thinking", "tool_format"}


def keys_without_effect(config: RunConfig, given: Mapping[str, Any]) -> dict[str, str]:
    """Keys among `given` that this run does not read -> the reason. Only values that ask for something count."""
    found: dict[str, str] = {}
    for applies, keys, why in _RULES:
        if applies(config):
            for key in keys:
                if key in given and key not in found and _asks_for_something(config, key):
                    found[key] = why
    return found


def _asks_for_something(config: RunConfig, key: str) -> bool:
    for _, section in config.sections():
        if key in type(section).model_fields:
            return getattr(section, key) != type(section).model_fields[key].default
    return True


def _is(command: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.command == command


def _continues_adapter(config: RunConfig) -> bool:
    return bool(config.model.adapter_name_or_path) and not getattr(config.adapter_options, "create_new_adapter", False)


def _samples(config: RunConfig) -> bool:
    """Whether the stage trains on answers that the policy samples."""
    return config.command == "train" and hasattr(config.stage_options, "reward_functions")


def _writes_answers(config: RunConfig) -> bool:
    """Whether answers to the evaluation rows are generated."""
    return config.command == "train" and config.train.predict_with_generate


def _samples_nothing(config: RunConfig) -> bool:
    return config.command == "train" and not _samples(config) and not _writes_answers(config)


def _answers_no_rows(config: RunConfig) -> bool:
    return config.command == "train" and not (config.data.eval_dataset or config.data.val_size)


def _no_training(config: RunConfig) -> bool:
    return config.command == "train" and not config.train.do_train


def _has_no_reference(config: RunConfig) -> bool:
    return getattr(config.stage_options, "pref_loss", None) in {"orpo", "simpo"}


def _drops_nothing(config: RunConfig) -> bool:
    wanted = getattr(config.stage_options, "use_asft_loss", True)
    return hasattr(config.stage_options, "ref_model") and wanted and not _has_no_reference(config)


def _lacks(switch: str) -> Callable[[RunConfig], bool]:
    """Whether the stage has this switch, and it is off."""
    return lambda config: getattr(config.stage_options, switch, None) is False


_TRAIN_KEYS = (
    *(key for key in TrainConfig.model_fields if key not in _SHARED_KEYS),
    *(key for key in DataConfig.model_fields if key not in CHAT_KEYS),
)
SCORE_KEYS = ("per_device_eval_batch_size", "dataset", "dataset_dir", "cutoff_len", "max_samples", "data_variables")
_NEW_ADAPTER_KEYS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "additional_target",
    "use_rslora",
    "use_dora",
)
_STEP_KEYS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "plot_loss",
)

_BEST_KEYS = ("metric_for_best_model", "greater_is_better")

_RULES: tuple[_Rule, ...] = (
    (_is("train"), tuple(ExportConfig.model_fields), "only read by the command export"),
    (_is("train"), ("infer_dtype", "use_kv_cache"), "only read by the command chat"),
    (_samples_nothing, tuple(GenerationConfig.model_fields), "only read where answers are written"),
    (_answers_no_rows, ("predict_with_generate",), "there are no rows to evaluate on"),
    (_samples, ("skip_special_tokens",), "rewards always see answers without special tokens"),
    (_is("chat"), tuple(ExportConfig.model_fields), "only read by the command export"),
    (_is("chat"), _TRAIN_KEYS, "only read by the command train"),
    (_is("export"), _TRAIN_KEYS, "only read by the command train"),
    (_is("score"), tuple(key for key in _TRAIN_KEYS if key not in SCORE_KEYS), "only read by the command train"),
    (_is("score"), tuple(ExportConfig.model_fields), "only read by the command export"),
    (_is("score"), tuple(GenerationConfig.model_fields), "only read where answers are written"),
    (lambda c: c.data.answers_trained == "last", ("rewritten_history",), "only the last answer is trained"),
    (_is("export"), tuple(GenerationConfig.model_fields), "only read by the command chat"),
    (_no_training, _STEP_KEYS, "do_train is off"),
    (lambda c: c.train.optim in {"sgd", "adafactor"}, _OPTIM_KEYS, "only for the AdamW optimizers"),
    (lambda c: c.train.warmup_steps > 0, ("warmup_ratio",), "warmup_steps is set"),
    (
        lambda c: not c.train.enable_torch_profiler,
        tuple(key for key in TrainConfig.model_fields if key.startswith("profiler_")),
        "enable_torch_profiler is off",
    ),
    (
        lambda c: c.train.torch_compile_backend not in (None, "inductor"),
        ("torch_compile_mode",),
        "only read by the inductor backend",
    ),
    (
        lambda c: c.train.include_num_input_tokens_seen == "all",
        ("include_num_input_tokens_seen",),
        "total_tokens in the log counts real tokens; padding is never counted",
    ),
    (lambda c: c.train.max_steps > 0, ("num_train_epochs",), "max_steps is set"),
    (lambda c: c.train.save_strategy != "steps", ("save_steps",), "save_strategy is not steps"),
    (lambda c: c.train.save_strategy == "no", ("save_total_limit", "save_only_model"), "save_strategy is no"),
    (lambda c: c.train.eval_strategy != "steps", ("eval_steps",), "eval_strategy is not steps"),
    (lambda c: c.train.eval_strategy == "no", _BEST_KEYS, "eval_strategy is no"),
    (lambda c: not c.data.eval_dataset, ("eval_on_each_dataset",), "eval_dataset is not set"),
    (lambda c: not (c.data.dataset or c.data.eval_dataset), ("max_samples",), "no data set is set"),
    (lambda c: not c.data.streaming, ("buffer_size",), "streaming is off"),
    (
        lambda c: c.data.streaming and not c.data.eval_dataset,
        ("overwrite_cache",),
        "streaming keeps no tokenised rows",
    ),
    (lambda c: c.data.mix_strategy == "concat", ("interleave_probs",), "mix_strategy is concat"),
    (lambda c: len(c.data.dataset) < 2, ("mix_strategy", "interleave_probs"), "there is one data set"),
    (lambda c: not c.model.adapter_name_or_path, ("adapter_folder",), "adapter_name_or_path is not set"),
    (_continues_adapter, _NEW_ADAPTER_KEYS, "the given adapter is continued as it was made (see create_new_adapter)"),
    (lambda c: c.model.disable_gradient_checkpointing is True, ("use_reentrant_gc",), "activations are kept"),
    (lambda c: not c.generation.do_sample, ("temperature", "top_p", "top_k"), "do_sample is off"),
    (lambda c: c.generation.num_beams == 1, ("length_penalty",), "num_beams is 1"),
    (lambda c: getattr(c.stage_options, "pref_loss", "") != "simpo", ("simpo_gamma",), "pref_loss is not simpo"),
    (
        _has_no_reference,
        ("pref_bco_weight", "ref_model", "ref_model_adapters", "cache_reference"),
        "pref_loss needs no reference",
    ),
    (lambda c: c.data.streaming, ("cache_reference",), "rows of a stream are read once"),
    (lambda c: not getattr(c.stage_options, "ref_model", None), ("ref_model_adapters",), "ref_model is not set"),
    (_lacks("use_asft_loss"), ("asft_alpha", "ref_model", "ref_model_adapters"), "use_asft_loss is off"),
    (_lacks("use_eaft_loss"), ("eaft_alpha",), "use_eaft_loss is off"),
    (_drops_nothing, ("lora_dropout",), "a policy that is compared with a reference runs without dropout"),
    (
        lambda c: c.train.stage in {"rm", "dpo", "kto", "grpo", "ppo"},
        ("packing",),
        "answers to a prompt are never packed",
    ),
    (lambda c: c.train.stage == "rm", ("loss_chunk_size",), "a reward model makes no logits"),
    (lambda c: c.generation.max_new_tokens > 0, ("max_length",), "max_new_tokens is set"),
)
