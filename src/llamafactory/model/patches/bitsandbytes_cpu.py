"""2026-11-25: what bitsandbytes 0.50 does unasked, two of it on CPUs with AVX512-BF16.

On import it fetches and runs compiled code of the hub (`kernels-community/quantization-bitsandbytes`) where `kernels`
is installed, and says that it could not where it is not; peft imports it wherever it is installed. It computes 4-bit
products in bfloat16 whatever dtype was asked for. And 8-bit layers say in every pass that they compute in float16.
Upstream: `bitsandbytes/backends/cpu/ops.py`, `Linear4bit.forward` in `bitsandbytes/nn/modules.py`, and
`MatMul8bitLt` in `bitsandbytes/autograd/_functions.py`. Delete when they have a switch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from llamafactory.extras.packages import is_installed

if TYPE_CHECKING:
    from torch import nn

_LOGGER = "bitsandbytes.backends.cpu.ops"
_LAYER_LOGGER = "bitsandbytes.autograd._functions"


def import_bitsandbytes() -> Any:
    """The module, imported without code of the hub; None where it is not installed. Call it before peft's import."""
    if not is_installed("bitsandbytes"):
        return None
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    modules: dict[str, Any] = sys.modules
    known, logger = modules.get("kernels"), logging.getLogger(_LOGGER)
    was_disabled, logger.disabled = logger.disabled, True
    modules["kernels"] = None  # an import of it fails now
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.disabled = was_disabled
        del modules["kernels"]
        if known is not None:
            modules["kernels"] = known


def as_asked_for(model: nn.Module) -> nn.Module:
    """The same model: its 4-bit layers compute in the dtype that they were made for, its 8-bit layers are quiet."""
    kind = import_bitsandbytes().nn.Linear4bit
    logging.getLogger(_LAYER_LOGGER).addFilter(_is_not_of_casts)
    for module in model.modules():
        if isinstance(module, kind):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
    return model


def _is_not_of_casts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")
