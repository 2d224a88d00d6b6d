"""`torch_compile`: each decoder block compiled by itself, once for all lengths.

Blocks of one kind share their graphs, so that compiling takes as long for 30 blocks as for one. Sizes are dynamic, and
attention over rows laid end to end stays outside of the graphs, since how many rows there are would be part of them.
What this file never does: compile generation, whose blocks get a cache; or blocks that run through `model.kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.packages import is_installed
from llamafactory.extras.suggest import did_you_mean
from llamafactory.model.skeleton import decoder_blocks

if TYPE_CHECKING:
    from llamafactory.hparams.train import TrainConfig

DEFAULT_BACKEND = "inductor"


def require_compiler(train: TrainConfig, device: str) -> None:
    """Looks for what `torch_compile` needs on this machine, before any weight is read.

    Args:
        train: names the backend.
        device: torch device type.

    Raises:
        ConfigError: an unknown backend, or no compiler for it.
    """
    from torch._dynamo.backends.registry import list_backends

    backend = train.torch_compile_backend or DEFAULT_BACKEND
    known = sorted(list_backends(exclude_tags=()))
    if backend not in known:
        raise ConfigError(
            Problem(
                key="torch_compile_backend", given=backend, message="torch has no such backend",
                allowed=", ".join(known), fix=did_you_mean(backend, known),
            )
        )  # fmt: skip
    if backend != DEFAULT_BACKEND:
        return
    if device == "cuda" and not is_installed("triton"):
        _refuse("on a GPU needs triton, which is not installed", "pip install triton")
    if device == "cpu" and not _has_cpp_compiler():
        _refuse("on a CPU needs a C++ compiler, and none was found", "install g++ or clang++, or name one in CXX")


def _refuse(message: str, fix: str) -> None:
    fix = f"{fix}; or torch_compile: false"
    raise ConfigError(Problem(key="torch_compile", given="true", message=message, fix=fix))


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_blocks(model: nn.Module, train: TrainConfig) -> int:
    """Compiles the decoder blocks of a model; torch makes the code when a block is first called.

    A block whose activations are recomputed is compiled inside its checkpoint. The number of graphs is bounded: torch
    compiles one piece of code at most 8 times (`torch._dynamo.config.recompile_limit`), then runs it as it is.

    Args:
        model: a transformers model, bare or wrapped by peft; its blocks get a `forward` of their own.
        train: backend and mode.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: the model has no blocks that can be compiled one by one.
    """
    blocks = decoder_blocks(model)
    if not blocks:
        _refuse(f"finds no blocks in {type(model).__name__} that can be compiled one by one", "leave the key out")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if base.config._attn_implementation == _attention().NAME:
        base.set_attn_implementation(_attention().register_uncompiled())
    for block in blocks:
        _compile_block(block, train)
    return len(blocks)


def _attention() -> Any:
    from llamafactory.model import attention

    return attention


def _compile_block(block: Any, train: TrainConfig) -> None:
    import torch

    stock: Callable[..., Any] = block.forward
    # transformers wraps the forward of a block's class in its checkpoint; the graphs belong inside
    inner: Any = getattr(type(block).forward, "__wrapped__", type(block).forward)
    compiled = torch.compile(
        MethodType(inner, block), dynamic=True, backend=train.torch_compile_backend or DEFAULT_BACKEND,
        mode=train.torch_compile_mode,
    )  # fmt: skip

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            return stock(*args, **kwargs)
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(functools.partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    block.forward = forward
