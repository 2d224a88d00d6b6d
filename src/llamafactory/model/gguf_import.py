"""Turns a GGUF file of the llama architecture into a folder that `from_pretrained` loads.

Weights are written in float32, which holds the dequantised values exactly. Measured on the embedded model, rounding
them to bfloat16 shifts logits by up to 0.28 and changes one greedy answer in five; float32 costs 540 MB of disk
instead of 270. Needs no torch and no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.gguf import GgufFile, read_tensor

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_DIGIT_SPLITTING_PRE_TOKENIZERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Values of `tokenizer.ggml.pre` that put every digit on its own before the byte-level split."""
_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of special tokens."""


def write_model_folder(source: GgufFile, folder: Path) -> None:
    """Write config, weights, tokenizer, chat template and generation config into `folder`, which must exist.

    Raises:
        LlamaFactoryError: the file holds another architecture, or a tokenizer that is not byte-level BPE.
    """
    architecture = source.metadata.get("general.architecture")
    tokenizer_model = source.metadata.get("tokenizer.ggml.model")
    if (architecture, tokenizer_model) != ("llama", "gpt2"):
        found = f"architecture {architecture!r} with tokenizer {tokenizer_model!r}"
        raise LlamaFactoryError(f"{source.path}: expected architecture 'llama' with tokenizer 'gpt2', found {found}")
    config = model_config(source)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _special_ids(source.metadata))
    write_weights(source, config, folder / "model.safetensors")
    write_tokenizer(source.metadata, folder)


def model_config(source: GgufFile) -> dict[str, Any]:
    """Return the content of `config.json` for `LlamaForCausalLM`."""
    meta = source.metadata
    theta = float(meta["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": int(meta["llama.vocab_size"]),
        "hidden_size": int(meta["llama.embedding_length"]),
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_attention_heads": int(meta["llama.attention.head_count"]),
        "num_key_value_heads": int(meta["llama.attention.head_count_kv"]),
        "head_dim": int(meta["llama.rope.dimension_count"]),
        "max_position_embeddings": int(meta["llama.context_length"]),
        # GGUF stores a float32: 9.99999974e-06 is the 1e-05 of the published config.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "initializer_range": 1 / 24,  # the published value; GGUF does not carry it, and only new weights use it
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": theta,  # for readers older than `rope_parameters`, which would assume 10000
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "use_cache": True,
        **_special_ids(meta),
    }


def write_weights(source: GgufFile, config: Mapping[str, Any], path: Path) -> None:
    """Write all tensors under their transformers names, float32."""
    from safetensors.numpy import save_file

    save_file(dict(_named_weights(source, config)), path, metadata={"format": "pt"})


def write_tokenizer(meta: Mapping[str, Any], folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Files of `tokenizer.ggml.pre` "smollm" and its kin split digits off before the byte-level split. Readers that leave
    this out encode a number after a line break or two spaces in a way that the model never saw in training.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if meta.get("tokenizer.ggml.pre") in _DIGIT_SPLITTING_PRE_TOKENIZERS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(meta["llama.context_length"]),
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8", newline="")


def _named_weights(source: GgufFile, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name in source.tensors:
        weight = read_tensor(source, name)
        if name in _TOP_NAMES:
            yield _TOP_NAMES[name], weight
            continue
        _, layer, kind, suffix = name.split(".")
        if kind == "attn_q":
            weight = _interleave_halves(weight, config["num_attention_heads"])
        elif kind == "attn_k":
            weight = _interleave_halves(weight, config["num_key_value_heads"])
        yield f"model.layers.{layer}.{_BLOCK_NAMES[kind]}.{suffix}", weight


def _interleave_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's rotary layout: each head's rows go from (pair, half) to (half, pair) order. [rows, columns]."""
    rows, columns = weight.shape
    by_pair = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(by_pair.swapaxes(1, 2).reshape(rows, columns))


def _special_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
