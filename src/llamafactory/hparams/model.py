"""Options of the model: where it comes from and how it is loaded."""

from __future__ import annotations

from typing import Literal

from llamafactory.hparams.section import Section, option

_SOURCE, _LOAD, _INFER = "Model source", "Model loading", "Inference"


class ModelConfig(Section):
    """Which model and adapters to load, and how."""

    model_name_or_path: str | None = option(
        None, "Local folder or hub id of the model, for example SmolLM2-135M-Instruct.", group=_SOURCE
    )
    adapter_name_or_path: tuple[str, ...] = option((), "Folders or hub ids of LoRA adapters to load.", group=_SOURCE)
    adapter_folder: str | None = option(None, "Subfolder that holds the adapter weights.", group=_SOURCE)
    cache_dir: str | None = option(None, "Folder for downloaded models and data sets.", group=_SOURCE)
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.", group=_SOURCE)
    hf_hub_token: str | None = option(
        None,
        "Token for private hub repositories; better set as HF_TOKEN in the environment.",
        group=_SOURCE,
        secret=True,
    )
    ms_hub_token: str | None = option(None, "Token for data sets on ModelScope.", group=_SOURCE, secret=True)
    om_hub_token: str | None = option(None, "Token for data sets on OpenMind.", group=_SOURCE, secret=True)
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", group=_SOURCE)
    offline: bool = option(False, "Never touch the network.", group=_SOURCE)
    train_from_scratch: bool = option(
        False, "Start from random weights; only the model's config is read.", group=_LOAD
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = option(
        "auto", "Attention implementation; auto takes the fastest that is exact here.", group=_LOAD
    )
    disable_gradient_checkpointing: bool | None = option(
        None, "Keep all activations; null lets the memory plan decide.", group=_LOAD
    )
    use_reentrant_gc: bool = option(
        False, "Use torch's reentrant activation checkpointing (LLaMA Factory 0.9 had true).", group=_LOAD
    )
    fused_kernels: bool = option(
        True, "Fused CPU kernels for model types that are proven; false runs transformers' own modules.", group=_LOAD
    )
    print_param_status: bool = option(
        False, "Print type, device and whether it is trained for every parameter.", group=_LOAD
    )
    infer_backend: Literal["huggingface"] = option("huggingface", "Engine for chat.", group=_INFER)
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = option(
        "auto", "Type of the weights for chat and export.", group=_INFER
    )
    use_kv_cache: bool = option(True, "Keep keys and values between generated tokens.", group=_INFER)
