"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft, with its rsLoRA and DoRA variants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.hparams.section import Section, option
from llamafactory.model.method import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Options(Section):
    """LoRA's own keys."""

    lora_rank: int = option(8, "Rank r of the two LoRA matrices.", group="lora", ge=1)
    lora_alpha: int | None = option(None, "Scale alpha; 2 x lora_rank when not set.", group="lora", ge=1)
    lora_dropout: float = option(0.0, "Dropout on the input of the LoRA matrices.", group="lora", ge=0.0, lt=1.0)
    lora_target: tuple[str, ...] = option(
        ("all",), "Names of linear modules to adapt, or all (every linear layer but the head).", group="lora"
    )
    additional_target: tuple[str, ...] = option(
        (), "Modules trained in full and saved beside the adapter (peft's modules_to_save).", group="lora"
    )
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) (arXiv 2312.03732).", group="lora")
    use_dora: bool = option(False, "Weight-decomposed LoRA (arXiv 2402.09353).", group="lora")
    create_new_adapter: bool = option(
        False, "Merge the given adapters into the base and train a fresh one.", group="lora"
    )


def apply(model: PreTrainedModel, options: Options, *, adapters: tuple[Path, ...], trainable: bool) -> nn.Module:
    """Wraps the base model with LoRA.

    Several adapters are merged in order; the last one is continued, unless `create_new_adapter`.

    Args:
        model: the loaded base model, all of it frozen by this call.
        options: LoRA's keys.
        adapters: folders with `adapter_config.json`.
        trainable: whether the run trains; without it a model with no adapter is returned as it is.

    Returns:
        A peft model, or the bare model where there is nothing to wrap.

    Raises:
        LlamaFactoryError: `lora_target` names a module that the model does not have.
    """
    from llamafactory.model.patches.bitsandbytes_cpu import import_bitsandbytes
    from llamafactory.model.patches.peft_future_warning import without_future_warning

    import_bitsandbytes()  # as peft would, but without code of the hub
    from peft import PeftModel

    model.requires_grad_(False)
    merged = merged_before(options, adapters)
    with without_future_warning():
        for folder in merged:
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        if len(merged) < len(adapters):
            continued = PeftModel.from_pretrained(model, str(adapters[-1]), is_trainable=trainable)
            return _unrounded(continued, adapters[-1]) if trainable else continued
        return _fresh(model, options) if trainable else model


def outline(model: PreTrainedModel, options: Options, *, adapters: tuple[Path, ...]) -> nn.Module:
    """The model as it will be trained, without weights: an adapter that is continued is made from its own config."""
    from llamafactory.model.patches.bitsandbytes_cpu import import_bitsandbytes
    from llamafactory.model.patches.peft_future_warning import without_future_warning

    import_bitsandbytes()  # as peft would, but without code of the hub
    from peft import PeftConfig, get_peft_model

    model.requires_grad_(False)
    continued = adapters[len(merged_before(options, adapters)) :]
    with without_future_warning():
        if not continued:
            return _fresh(model, options)
        config = PeftConfig.from_pretrained(str(continued[-1]))
        config.inference_mode = False
        return get_peft_model(model, config)


def merged_before(options: Options, adapters: tuple[Path, ...]) -> tuple[Path, ...]:
    """The adapters that are merged into the base: all but the last, or all under `create_new_adapter`."""
    return adapters if options.create_new_adapter else adapters[:-1]


def _unrounded(model: Any, folder: Path) -> nn.Module:
    """Peft loads `modules_to_save` in the dtype of the base; what is trained is kept in float32, and read again."""
    import torch

    rounded = [one for one in model.parameters() if one.requires_grad and one.dtype != torch.float32]
    if not rounded:
        return model
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for parameter in rounded:
        parameter.data = parameter.data.float()
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def _fresh(model: PreTrainedModel, options: Options) -> nn.Module:
    """A new adapter on `model`, its A matrices drawn from torch's global generator."""
    from peft import LoraConfig, TaskType, get_peft_model

    _check_targets(model, options)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if "all" in options.lora_target else list(options.lora_target),
        modules_to_save=list(options.additional_target) or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    return get_peft_model(model, config)


def _check_targets(model: PreTrainedModel, options: Options) -> None:
    """Refuses a target that matches nothing: peft only complains when *no* target matches."""
    from torch import nn

    from llamafactory.extras.errors import LlamaFactoryError

    if "all" in options.lora_target and len(options.lora_target) > 1:
        raise LlamaFactoryError(
            f"lora_target: {','.join(options.lora_target)} mixes all with names. Give all alone (every linear layer "
            "but the head), or the whole list of names."
        )
    names = [name for name, _ in model.named_modules()]
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = [name for name in (*options.lora_target, *options.additional_target) if name != "all"]
    missing = [
        target for target in targets if not any(name == target or name.endswith("." + target) for name in names)
    ]
    if missing:
        raise LlamaFactoryError(
            f"lora_target/additional_target: {', '.join(missing)} matches no module of {type(model).__name__}. "
            f"Linear modules here: {', '.join(sorted(linear))}. Name some of them, or use lora_target: all."
        )


METHOD = Method(apply=apply, outline=outline, merged_before=merged_before, trains_base=False, saves_adapter=True)
