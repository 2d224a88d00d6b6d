"""`fsdp` and `fsdp_config`, or `deepspeed` -> how a model is spread over the processes.

They are read as transformers and accelerate write them: names with and without the prefix `fsdp_`, values of FSDP1
that mean something in FSDP2, ZeRO stages (`deepspeed.py`). What would change the run and is not implemented is an
error; what only tunes another engine is listed as having no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.deepspeed import NOT_OFFLOADED, ZeroRequest, read_deepspeed
from llamafactory.hparams.json_file import parse_json
from llamafactory.hparams.run_config import RunConfig

STAGES = ("pt", "sft", "rm", "dpo", "kto")
_STRATEGIES = {"full_shard": True, "shard_grad_op": False, "1": True, "2": False}
"""Sharding strategy of FSDP1 -> whether weights are let go between the forward and the backward pass."""
_BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_WORDS: dict[str, dict[str, bool]] = {
    "full_shard": {"reshard_after_forward": True}, "shard_grad_op": {"reshard_after_forward": False}, "auto_wrap": {},
    "offload": {},
}  # fmt: skip
"""Words of `fsdp` -> fields of `Sharding`."""
_NO_EFFECT = {
    "version": "FSDP2 is used in any case",
    "auto_wrap_policy": "each decoder block is a unit, whatever the policy says",
    "transformer_layer_cls_to_wrap": "the decoder blocks are found without it",
    "transformer_cls_names_to_wrap": "the decoder blocks are found without it",
    "min_num_params": "each decoder block is a unit",
    "activation_checkpointing": "the plan recomputes where memory asks; disable_gradient_checkpointing decides",
    "cpu_ram_efficient_loading": "every process reads the weights, and keeps its share",
    **dict.fromkeys(("offload", "cpu_offload", "offload_params"), NOT_OFFLOADED),
    **dict.fromkeys(
        ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "use_orig_params", "sync_module_states"),
        "only FSDP1 reads it",
    ),
}
_ASKS_FOR_NOTHING = {
    "version": ("2",), "auto_wrap_policy": ("transformer_based_wrap",), "min_num_params": ("0",),
    "cpu_offload": ("false", "0", "no"), "offload_params": ("false", "0", "no"),
}  # fmt: skip
_OFF_ONLY = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings")
_FORMS = {"full_state_dict": "whole", "sharded_state_dict": "sharded"}
_READ: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "reshard_after_forward": ("reshard_after_forward", {**_STRATEGIES, **_BOOLS}, "true, false"),
    "sharding_strategy": ("reshard_after_forward", _STRATEGIES, "FULL_SHARD, SHARD_GRAD_OP"),
    "state_dict_type": ("weights", _FORMS, "FULL_STATE_DICT, SHARDED_STATE_DICT"),
}
"""Key of `fsdp_config` -> field of `Sharding`, what its values mean, and what is allowed."""
_KEYS = (*_READ, *_NO_EFFECT, *_OFF_ONLY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How a model is spread over the processes (FSDP2).

    Attributes:
        reshard_after_forward: let go of a block's gathered weights after its forward pass, and gather them again for
            the backward pass; False keeps them, for more memory and less traffic.
        weights: in checkpoints: `whole` as plain model files, or `sharded`, each process its part. An adapter and the
            result of a run are always whole.
        without_effect: keys of `asked_by` that do nothing here -> why.
        asked_by: the option that asks for it.
        zero: the DeepSpeed configuration that it comes from, if it does.
    """

    reshard_after_forward: bool = True
    weights: Literal["whole", "sharded"] = "whole"
    without_effect: Mapping[str, str] = field(default_factory=dict[str, str])
    asked_by: Literal["fsdp", "deepspeed"] = "fsdp"
    zero: ZeroRequest | None = None

    @property
    def words(self) -> str:
        """How it is called in `fsdp`."""
        return "full_shard" if self.reshard_after_forward else "shard_grad_op"

    @property
    def source(self) -> str:
        """What asks for it, for people."""
        return f"deepspeed: {self.zero.name}, ZeRO stage {self.zero.stage}" if self.zero else "fsdp (set by you)"


def sharding_of(config: RunConfig) -> Sharding | None:
    """What the configuration asks for, or None where weights are not spread.

    Raises:
        ConfigError: with everything that is wrong.
    """
    sharding, problems = _read(config)
    if problems:
        raise ConfigError(problems)
    return sharding


def configuration_files(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What the files of `deepspeed` and `fsdp_config` hold, by option, so that a run can be told from another one.

    Options without a file, and files that cannot be read, are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in ("deepspeed", "fsdp_config"):
        given = getattr(config.train, key)
        if isinstance(given, str) and given:
            with suppress(OSError, RuntimeError, UnicodeDecodeError, ConfigError):
                text = Path(given).expanduser().read_text(encoding="utf-8-sig")
                found[key] = {name: value for name, value, _ in parse_json(text, given)}
    return found


def check_sharding(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with `fsdp`, `fsdp_config` and `deepspeed`, and what cannot be combined with them."""
    if config.command not in ("train", "plan"):
        return
    sharding, problems = _read(config)
    yield from problems
    if config.train.fsdp_config and not problems and (sharding is None or sharding.zero):
        yield Problem(key="fsdp_config", message="does nothing without fsdp", fix="fsdp: full_shard")
    if sharding is None:
        return
    by = sharding.asked_by
    if config.train.fp16:
        yield Problem(key="fp16", message=f"its loss scaling is not implemented with {by}", fix="bf16: true")
    if config.train.optim == "adafactor":
        yield Problem(
            key="optim", message=f"adafactor needs whole rows of a weight, and {by} spreads them", fix="adamw_torch"
        )
    for key in ("do_predict", "predict_with_generate"):
        if getattr(config.train, key):
            fix = f"predict in a run of its own, from the output folder, without {by}"
            yield Problem(key=key, message=f"predictions need a whole model, and {by} spreads it", fix=fix)
    if config.model.use_reentrant_gc:
        message = "reentrant checkpointing does not gather weights again in the backward pass"
        yield Problem(key="use_reentrant_gc", message=message, fix=f"use_reentrant_gc: false, with {by}")
    if config.train.stage not in STAGES:
        yield Problem(
            key=by,
            message=f"not for stage {config.train.stage}, which samples answers from a whole model",
            fix=f"remove {by}; finetuning_type: lora needs less memory",
        )


def _read(config: RunConfig) -> tuple[Sharding | None, list[Problem]]:
    zero, problems = read_deepspeed(config)
    sharding, more = _read_fsdp(config)
    if sharding is not None and config.train.deepspeed:
        more.append(Problem(key="deepspeed", message="not beside fsdp: both spread the model", fix="remove one"))
    if sharding is None and zero is not None and zero.stage:
        sharding = Sharding(
            reshard_after_forward=zero.stage == 3,
            weights="whole" if zero.gathers_weights else "sharded",
            without_effect=zero.without_effect,
            asked_by="deepspeed",
            zero=zero,
        )
    return sharding, [*problems, *more]


def _read_fsdp(config: RunConfig) -> tuple[Sharding | None, list[Problem]]:
    problems: list[Problem] = []
    words = _words(config.train.fsdp)
    if words is None:
        return None, []
    read: dict[str, Any] = {}
    for word in words:
        if word in _WORDS:
            read |= _WORDS[word]
        else:
            problems.append(_refused_word(word))
    without_effect = {"offload": NOT_OFFLOADED} if "offload" in words else {}
    for key, value in _entries(config.train.fsdp_config, problems).items():
        text = str(value).strip().lower()
        field_name, values, allowed = _READ.get(key, ("", {}, ""))
        if text in values:
            read[field_name] = values[text]
        elif field_name:
            problems.append(_problem(key, value, "not implemented", allowed=allowed))
        elif key in _NO_EFFECT:
            if text not in ("none", "", *_ASKS_FOR_NOTHING.get(key, ())):
                without_effect[key] = _NO_EFFECT[key]
        else:
            problems.extend(_problems_of(key, value))
    return Sharding(**read, without_effect=without_effect), problems


def _problems_of(key: str, value: Any) -> Iterator[Problem]:
    """What is wrong with a key that is not read."""
    if key not in _OFF_ONLY:
        yield _problem(key, value, "unknown key", fix=did_you_mean(key, _KEYS) or f"remove {key}")
    elif _BOOLS.get(str(value).strip().lower(), bool(value)):
        yield _problem(key, value, "not implemented", fix=f"{key}: false")


def _words(given: bool | str | None) -> list[str] | None:
    """The words of `fsdp`; None where it is off."""
    if given is True:
        return []
    text = str(given or "").strip().lower()
    if text in ("", "none", "null", "false", "no", "off", "[]"):
        return None
    words = text.strip("[]").replace(",", " ").replace('"', " ").replace("'", " ").split()
    return [word for word in words if word not in ("true", "yes", "on")]


def _entries(given: Mapping[str, Any] | str | None, problems: list[Problem]) -> dict[str, Any]:
    """The entries of `fsdp_config`, a mapping or a JSON file, without the prefix `fsdp_`."""
    if isinstance(given, str):
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8-sig")
            given = {key: value for key, value, _ in parse_json(text, given)}
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            problems.append(
                Problem(key="fsdp_config", message=f"cannot be read: {error}", allowed="a mapping, or a JSON file")
            )
        except ConfigError as error:
            problems.extend(error.problems)
    if isinstance(given, str) or not given:
        return {}
    return {str(key).removeprefix("fsdp_"): value for key, value in cast("Mapping[str, Any]", given).items()}


def _refused_word(word: str) -> Problem:
    known = ("hybrid_shard", "hybrid_shard_zero2", "no_shard")
    message = f"'{word}' is known, but not implemented in this version" if word in known else f"unknown word '{word}'"
    fix = "leave fsdp out: every process then holds the whole model" if word == "no_shard" else "fsdp: full_shard"
    return Problem(key="fsdp", message=message, allowed="true, full_shard, shard_grad_op, auto_wrap", fix=fix)


def _problem(key: str, value: Any, message: str, *, allowed: str | None = None, fix: str | None = None) -> Problem:
    return Problem(key="fsdp_config", given=f"{key}: {value}", message=f"{key}: {message}", allowed=allowed, fix=fix)
