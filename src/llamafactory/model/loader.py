"""The only `from_pretrained` calls: tokenizer, config and weights, with one clear error for each way to fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.hub import explain, is_of_network
from llamafactory.model.embedded import resolve_model_path
from llamafactory.model.hub import Revision, find_revision

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from llamafactory.hparams.model import ModelConfig

T = TypeVar("T")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""Never loaded, so never downloaded."""
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_CHATS = "additional_chat_templates/"
_WHOLE = {"model.safetensors"}


def load_tokenizer(cfg: ModelConfig, *, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """Loads the tokenizer; a missing pad token becomes the end token (padding is masked by position, never by id).

    Args:
        cfg: names the model.
        eos_token: end token that a template puts in place of the tokenizer's own.

    Raises:
        LlamaFactoryError: not found, not a fast (Rust) tokenizer, or without any end token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = model_path(cfg)
    override = {"eos_token": eos_token} if eos_token else {}
    tokenizer = _loading(
        path, lambda: AutoTokenizer.from_pretrained(path, use_fast=True, **_hub_options(cfg, path), **override)
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise LlamaFactoryError(
            f"{cfg.model_name_or_path}: its tokenizer has no fast (tokenizer.json) form, which this project needs. "
            "Convert it with transformers and save it beside the model."
        )
    if tokenizer.eos_token_id is None:
        raise LlamaFactoryError(f"{cfg.model_name_or_path}: the tokenizer has no end token (eos_token).")
    if tokenizer.pad_token_id is None:
        tokenizer = _loading(
            path,
            lambda: AutoTokenizer.from_pretrained(
                path, use_fast=True, pad_token=tokenizer.eos_token, **_hub_options(cfg, path), **override
            ),
        )
    return tokenizer


def load_model_config(cfg: ModelConfig) -> PreTrainedConfig:
    """Loads the model's config without its weights."""
    from transformers import AutoConfig

    path = model_path(cfg)
    return _loading(path, lambda: AutoConfig.from_pretrained(path, **_hub_options(cfg, path)))


def load_model(
    cfg: ModelConfig,
    *,
    dtype: str,
    attention: str,
    device: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        cfg: names the model.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        attention: attention implementation; `segments` is registered here.
        device: where to put the weights; None leaves them on the CPU (accelerate places them in training).
        quantization: of linear layers, while they are loaded; see `model.quantised`.

    Raises:
        LlamaFactoryError: not found, not a causal language model, or weights in shards that shall be quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llamafactory.model import attention as segment_attention
    from llamafactory.model.shards import WEIGHT_SHARDS

    if attention == segment_attention.NAME:
        segment_attention.register()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    path = model_path(cfg)
    shards = Path(path) / WEIGHT_SHARDS
    if quantization is not None:
        if shards.is_dir():
            raise LlamaFactoryError(
                f"{cfg.model_name_or_path} holds its weights in shards of several processes, which are not quantised. "
                "Export it first: llamafactory-cli export makes a folder of safetensors."
            )
        options |= {"quantization_config": quantization, "device_map": {"": device or "cpu"}}
        quantised = _loading(
            path,
            lambda: AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, **_hub_options(cfg, path, weights=True), **options
            ),
        )
        for parameter in quantised.parameters():
            if parameter.is_floating_point() and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()  # a part of the mapped file would keep all of it in memory
        return quantised
    if cfg.train_from_scratch or shards.is_dir():
        config = load_model_config(cfg)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code, **options)
        if not cfg.train_from_scratch:
            _fill_from_shards(model, shards)
    else:
        model = _loading(
            path,
            lambda: AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, **_hub_options(cfg, path, weights=True), **options
            ),
        )
    return cast("Any", model).to(device) if device else model


def load_classifier(cfg: ModelConfig, *, dtype: str, attention: str) -> PreTrainedModel:
    """Loads a sequence classifier, as `export` writes a reward model.

    Args:
        cfg: names the model.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        attention: attention implementation; `segments` is registered here.

    Raises:
        LlamaFactoryError: not found, no sequence classifier, or tensors that are missing or left over (a bias).
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from llamafactory.model import attention as segment_attention

    if attention == segment_attention.NAME:
        segment_attention.register()
    path = model_path(cfg)
    model, found = _loading(
        path,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, **_hub_options(cfg, path, weights=True), dtype=getattr(torch, dtype),
            attn_implementation=attention, output_loading_info=True,
        ),
    )  # fmt: skip
    left_over = {name for name in found["unexpected_keys"] if not name.startswith("lm_head.")}  # scores do without it
    faults = {"has no": found["missing_keys"], "has what the model has no place for:": left_over}
    for what, names in faults.items():
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise LlamaFactoryError(
                f"{cfg.model_name_or_path} {what} {shown}; it would score otherwise than it was trained"
            )
    return model


def _fill_from_shards(model: PreTrainedModel, folder: Path) -> None:
    """Takes the weights of a checkpoint of which several processes wrote a part each."""
    from llamafactory.model.shards import read_whole

    missing, unknown = model.load_state_dict(read_whole(folder), strict=False)
    needed = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied weights have one name
    faults = sorted({*missing} & needed | {*unknown})
    if faults:
        raise LlamaFactoryError(f"{folder} does not hold this model: {', '.join(faults[:5])}")
    model.tie_weights()


def model_path(cfg: ModelConfig) -> str:
    """The folder or hub id to load from; the embedded default model is unpacked on first use."""
    name = cfg.model_name_or_path or ""
    cache = Path(cfg.cache_dir) if cfg.cache_dir else None
    return resolve_model_path(name, cache_dir=cache, offline=cfg.offline)


def folder_with(cfg: ModelConfig, file: str) -> Path:
    """The model's folder on this machine, with a file beside its weights; of a repository that file is downloaded.

    Args:
        cfg: names the model.
        file: that the folder holds, if the model has it.

    Raises:
        LlamaFactoryError: the hub gives no answer, or refuses.
    """
    path = model_path(cfg)
    if Path(path).is_dir():
        return Path(path)
    return _fetch(cfg, path, _revision(cfg, path, revision=cfg.model_revision), only=[escape(file)])


def adapter_folders(cfg: ModelConfig) -> tuple[Path, ...]:
    """Local folders of the adapters, downloaded where they are hub ids.

    Raises:
        LlamaFactoryError: a folder has no `adapter_config.json`.
    """
    folders = []
    for name in cfg.adapter_name_or_path:
        folder = Path(name)
        if not folder.is_dir():
            folder = _download(cfg, name)
        folder = folder / cfg.adapter_folder if cfg.adapter_folder else folder
        if not (folder / "adapter_config.json").is_file():
            raise LlamaFactoryError(
                f"adapter_name_or_path: {folder} holds no adapter_config.json. Give the output_dir of a LoRA run, or "
                "one of its checkpoint-N folders."
            )
        if not (folder / "adapter_model.safetensors").is_file():
            raise LlamaFactoryError(
                f"adapter_name_or_path: {folder} holds no adapter_model.safetensors. Pickled weights (*.bin) are "
                "never loaded; convert them with safetensors in a place where running their code does no harm."
            )
        folders.append(folder)
    return tuple(folders)


def _download(cfg: ModelConfig, name: str) -> Path:
    """The folder of an adapter on the hub."""
    return _fetch(cfg, name, _revision(cfg, name, revision="main"))


def _fetch(cfg: ModelConfig, name: str, revision: Revision, only: list[str] | None = None) -> Path:
    """Files of a repository, in a folder of this machine; nothing is asked for that is there already."""
    from huggingface_hub import snapshot_download

    return Path(
        _loading(
            name,
            lambda: snapshot_download(
                name, revision=revision.name, cache_dir=cfg.cache_dir, token=cfg.hf_hub_token,
                local_files_only=revision.is_local, allow_patterns=only, ignore_patterns=list(_PICKLES),
            ),
        )
    )  # fmt: skip


def _fetch_model(cfg: ModelConfig, name: str, revision: Revision, *, weights: bool) -> None:
    """What `from_pretrained` reads of a repository: all files for the tokenizer and the config, then the weights."""
    small = [file for file in revision.files if file.endswith(_SMALL) and "/" not in file or file.startswith(_CHATS)]
    folder = _fetch(cfg, name, revision, only=list(map(escape, small)))
    if weights:
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else _WHOLE
        _fetch(cfg, name, revision, only=[escape(file) for file in revision.files if file in shards])


def _revision(cfg: ModelConfig, name: str, *, revision: str) -> Revision:
    return find_revision(name, revision=revision, cache_dir=cfg.cache_dir, token=cfg.hf_hub_token, offline=cfg.offline)


def _hub_options(cfg: ModelConfig, path: str, *, weights: bool = False) -> dict[str, Any]:
    """Options that every `from_pretrained` call gets, so that each file is of the same commit.

    What a call reads of the hub is downloaded before, as the library takes a file that breaks off for one that is not
    there. Code of other repositories, where it is allowed, is fetched by the library.

    Raises:
        LlamaFactoryError: the hub gives no answer, or refuses.
    """
    revision = Revision(name=cfg.model_revision, is_local=cfg.offline)
    if not Path(path).is_dir():
        revision = _revision(cfg, path, revision=cfg.model_revision)
        if revision.files:
            _fetch_model(cfg, path, revision, weights=weights)
    return {
        "revision": revision.name,
        "cache_dir": cfg.cache_dir,
        "token": cfg.hf_hub_token,
        "trust_remote_code": cfg.trust_remote_code,
        "local_files_only": revision.is_local or (bool(revision.files) and not cfg.trust_remote_code),
    }


def _loading(name: str, load: Callable[[], T]) -> T:
    """Runs a loading call and turns the library's long traces into one message; its bars show on a terminal only."""
    from transformers.utils import logging as library_log

    if not sys.stderr.isatty():
        library_log.disable_progress_bar()
    try:
        return load()
    except LlamaFactoryError:
        raise
    except Exception as error:  # of the hub's client or of the network too, where it is no folder
        if Path(name).is_dir() and not isinstance(error, OSError | ValueError | KeyError):
            raise
        raise _failure(name, error) from error


def _failure(name: str, error: Exception) -> LlamaFactoryError:
    """One message for whatever a library complained about."""
    if is_of_network(error):
        what, fix = explain(error, name)
        return LlamaFactoryError(f"cannot load {name!r} from the hub: {what}\n    fix:     {fix}")
    first_line = str(error).strip().split("\n")[0]
    return LlamaFactoryError(
        f"cannot load {name!r}: {type(error).__name__}: {first_line}\n"
        "Give a folder that holds config.json, tokenizer.json and *.safetensors, a hub id that this machine can "
        "reach, or SmolLM2-135M-Instruct, which comes with the project."
    )
