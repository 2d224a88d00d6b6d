"""The model of a run without its weights: built on the meta device, the adapter applied by its own code.

So parameters are counted, not estimated, for every architecture that transformers knows. Nothing here computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llamafactory.model.method import load_method

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from llamafactory.hparams.section import Section
    from llamafactory.model.precision import DType

_ADAPTER_PART = re.compile(r"\.(?:lora_\w+|modules_to_save|original_module|base_layer)\b.*|\.(?:weight|bias)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedKind:
    """The trained parameters of one kind of module.

    Attributes:
        kind: last part of the modules' names, for example `q_proj`.
        num_modules: how many there are.
        num_parameters: trained parameters of all of them.
    """

    kind: str
    num_modules: int
    num_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a model with its adapter; every one is counted once, shared ones too.

    Attributes:
        base: of the model without the adapter.
        adapter: that the adapter added, and a value head.
        trained: that get gradients.
        trained_bytes: bytes of the trained ones, in the dtype they are kept in.
        weight_bytes: bytes of all of them.
        buffer_bytes: bytes of buffers (rotary tables and the like).
        trained_by_block: trained parameters of each decoder block.
        kinds: the trained ones by kind of module.
    """

    base: int
    adapter: int
    trained: int
    trained_bytes: int
    weight_bytes: int
    buffer_bytes: int
    trained_by_block: tuple[int, ...]
    kinds: tuple[TrainedKind, ...]


def build_skeleton(
    config: PreTrainedConfig,
    *,
    dtype: DType,
    attention: str,
    finetuning_type: str,
    options: Section,
    adapters: tuple[Path, ...] = (),
    pure_bf16: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model as training would hold it, on the meta device and in training mode.

    Args:
        config: the model's config.
        dtype: dtype of the loaded weights.
        attention: name of the attention implementation.
        finetuning_type: name of the method.
        options: the method's `Options`.
        adapters: folders of trained adapters; only the config of the one that is continued is read.
        pure_bf16: trained parameters are kept in bfloat16 and not in float32.
        trust_remote_code: run the model's own Python code.
    """
    import copy

    from transformers import AutoModelForCausalLM

    from llamafactory.model import attention as segment_attention

    if attention == segment_attention.NAME:
        segment_attention.register()
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # a model writes its attention into its config
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
        model = load_method(finetuning_type).outline(base, options, adapters=adapters)
    master = torch.bfloat16 if pure_bf16 else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    return model.train()


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks whose activations can be recomputed one by one, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model of a config."""
    import copy

    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model, with weights or without."""
    kinds: dict[str, tuple[set[str], int]] = {}
    adapter = 0
    for name, parameter in model.named_parameters():
        is_added = ".lora_" in name or ".modules_to_save." in name or name.startswith("v_head.")
        adapter += parameter.numel() if is_added else 0
        if parameter.requires_grad:
            module = _ADAPTER_PART.sub("", name)
            modules, count = kinds.get(module.rsplit(".", 1)[-1], (set[str](), 0))
            kinds[module.rsplit(".", 1)[-1]] = (modules | {module}, count + parameter.numel())
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    return ParameterCount(
        base=sum(parameter.numel() for parameter in everything) - adapter,
        adapter=adapter,
        trained=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        weight_bytes=sum(parameter.nbytes for parameter in everything),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        trained_by_block=tuple(
            sum(parameter.numel() for parameter in block.parameters() if parameter.requires_grad)
            for block in decoder_blocks(model)
        ),
        kinds=tuple(
            TrainedKind(kind=kind, num_modules=len(modules), num_parameters=count)
            for kind, (modules, count) in sorted(kinds.items())
        ),
    )


def transformer_of(model: nn.Module) -> nn.Module:
    """The stack below the head, with the adapters that sit inside its layers."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return cast("nn.Module", base.base_model)
