"""`plan`: what a training run will cost and how it will use the machine, before any weights are loaded.

Needs the model's `config.json` and nothing else of it. The rows are read where that is quick; otherwise each is
assumed to have `cutoff_len` tokens, and the plan says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llamafactory.commands.option_help import PLAN_WORDS
from llamafactory.extras.errors import ConfigError, LlamaFactoryError, Problem

if TYPE_CHECKING:
    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig

_QUICK_BYTES = 16 * 2**20
"""Files up to this size are read and tokenised for their lengths."""


def main(argv: list[str]) -> int:
    """Print the plan of a configuration.

    Returns:
        0 where the run fits, 2 where it does not.

    Raises:
        LlamaFactoryError: the configuration is wrong, or the model's config cannot be read.
    """
    from llamafactory.compose import load_config

    words, own = split_words(argv)
    cfg = load_config(words, command="plan")
    num_devices = _count(own.get("num-devices", ""))
    hardware = _hardware(own.get("device", "auto"), num_devices, use_cpu=cfg.train.use_cpu)

    from llamafactory.commands.plan_table import plan_document, print_plan
    from llamafactory.model.loader import load_model_config
    from llamafactory.model.remedies import find_ways_out
    from llamafactory.train.planning import planner

    import_module("llamafactory.train.finish")  # a run has this and its libraries loaded too: their memory counts
    examples, why = _quick_rows(cfg)
    plan_again = planner(
        load_model_config(cfg.model),
        hardware,
        examples,
        num_devices=num_devices,
        rate=_rate(own.get("device", "auto"), hardware, cfg),
    )
    plan = plan_again(cfg)
    if plan.costs is None:
        raise LlamaFactoryError(f"this model cannot be planned: {plan.reasons['checkpoint_every']}")
    ways = [] if plan.costs.fits else find_ways_out(cfg, hardware, plan_again)
    document = plan_document(cfg, plan, hardware, ways, num_devices=num_devices, why_assumed=why)
    if "json" in own:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        print_plan(document)
    return 0 if plan.costs.fits else 2


def split_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the configuration, and this command's own.

    Raises:
        ConfigError: a word that wants a value has none.
    """
    wants_value = {word.split()[0]: " " in word for word, _ in PLAN_WORDS}
    words: list[str] = []
    own: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        key, has_value, value = word.partition("=")
        if key not in wants_value:
            words.append(word)
        elif wants_value[key]:
            own[key.removeprefix("--")] = value if has_value else next(rest, "")
            if not own[key.removeprefix("--")]:
                raise ConfigError(Problem(key=key, message="has no value", fix=f"{key} VALUE"))
        else:
            own[key.removeprefix("--")] = "true"
    return words, own


def _count(text: str) -> int:
    if not text:
        return 1
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(
        Problem(key="--num-devices", given=text, message="not a count", allowed="a whole number > 0", fix="8")
    )


def _hardware(name: str, num_devices: int, *, use_cpu: bool) -> Hardware:
    from llamafactory.extras.devices import hardware_of
    from llamafactory.extras.hardware import read_hardware

    if name.lower() in ("auto", "cpu"):
        return read_hardware(use_cpu=use_cpu or name.lower() == "cpu")
    return hardware_of(name, num_devices=num_devices)


def _rate(name: str, hardware: Hardware, cfg: RunConfig) -> float | None:
    """FLOP/s in matrix products: measured on this machine, of the data sheet for a named device."""
    is_half = cfg.train.bf16 or cfg.train.fp16 or cfg.train.pure_bf16
    if name.lower() not in ("auto", "cpu"):
        from llamafactory.extras.devices import find_device

        facts = find_device(name)
        return None if facts is None else (facts.half if is_half else facts.float32)
    import torch

    from llamafactory.extras.hardware import measure_gemm_peak

    dtype = torch.float32 if not is_half else torch.float16 if cfg.train.fp16 else torch.bfloat16
    return measure_gemm_peak(hardware.device, dtype, size=1024 if hardware.device == "cpu" else 8192)


def _quick_rows(cfg: RunConfig) -> tuple[Any, str]:
    """The training rows where they are quick to read, else None and why not."""
    if not cfg.data.dataset:
        return None, "no data set is named"
    from llamafactory.data.pipeline import prepare_data
    from llamafactory.data.registry import find_specs
    from llamafactory.train.stage import load_stage
    from llamafactory.train.text import data_seed, load_text

    try:
        size = sum(_size_of(spec) for spec in find_specs(cfg.data.dataset, cfg.data.dataset_dir))
        if size > _QUICK_BYTES and (cfg.data.max_samples or size) > 5000:
            return None, f"the data has {size / 1e6:,.0f} MB; max_samples=5000 would read the first rows"
        tokenizer, template = load_text(cfg)
        view = load_stage(cfg.train.stage).view
        data = prepare_data(cfg.data, template, tokenizer, view=view, seed=data_seed(cfg))
    except LlamaFactoryError as error:
        return None, str(error).splitlines()[0]
    return data.train, ""


def _size_of(spec: Any) -> int:
    """Bytes of a local data set; one that lies elsewhere counts as too large to be quick."""
    from pathlib import Path

    path = Path(spec.location)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return _QUICK_BYTES + 1
