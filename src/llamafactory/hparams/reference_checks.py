"""Rules of a quantised reference model: what it needs, and what it cannot be."""

from __future__ import annotations

from typing import Any

from llamafactory.extras.errors import Problem
from llamafactory.extras.packages import install_hint, is_installed
from llamafactory.hparams.run_config import RunConfig

_KEY = "ref_model_quantization_bit"
_BITS = (4, 8)


def check_quantised_reference(config: RunConfig) -> Problem | None:
    """`ref_model_quantization_bit` quantises `ref_model`, on load, by bitsandbytes."""
    options: Any = config.stage_options
    bits = getattr(options, _KEY, None)
    if config.command != "train" or bits is None:
        return None
    loss = getattr(options, "pref_loss", None)
    if bits not in _BITS:
        return Problem(key=_KEY, message="not a number of bits that a reference can have", allowed="4, 8 or null")
    if loss in ("orpo", "simpo"):
        return Problem(key=_KEY, message=f"pref_loss {loss} compares with no reference", fix="remove this key")
    if options.ref_model is None:
        name = config.model.model_name_or_path or "NAME"
        return Problem(
            key=_KEY, message="quantises ref_model, which is not set",
            fix=f"ref_model: {name} for a quantised copy of the model before training; or remove this key",
        )  # fmt: skip
    if len(options.ref_model_adapters) > 1:
        return Problem(
            key=_KEY, message="adapters are not merged into quantised weights, so that there can be one at most",
            allowed="one folder in ref_model_adapters",
            fix="merge the others into ref_model first: llamafactory-cli export",
        )  # fmt: skip
    if not is_installed("bitsandbytes"):
        return Problem(key=_KEY, message="needs bitsandbytes", fix=f"{install_hint('bitsandbytes')}; or remove it")
    return None


REFERENCE_CHECKS = (check_quantised_reference,)
