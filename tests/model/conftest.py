"""A GGUF file of a few kilobytes, with every tensor type of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a two-layer llama with random weights, written by the `gguf` package."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = _add_tokenizer(writer)
    writer.add_vocab_size(len(tokens))
    rng = np.random.default_rng(0)
    for name, shape, kind in _tensors(len(tokens)):
        values = rng.normal(size=shape).astype(np.float32)
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> list[str]:
    from tokenizers import pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "hi"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ċ Ċ", "h i"])
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    return tokens


def _tensors(vocab: int) -> list[tuple[str, tuple[int, ...], str]]:
    kv_rows = HIDDEN // HEADS * KV_HEADS
    rows: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (vocab, HIDDEN), "Q8_0")]
    for layer in range(LAYERS):
        rows += [
            (f"blk.{layer}.attn_norm.weight", (HIDDEN,), "F32"),
            (f"blk.{layer}.ffn_norm.weight", (HIDDEN,), "F32"),
            (f"blk.{layer}.attn_q.weight", (HIDDEN, HIDDEN), "Q4_1"),
            (f"blk.{layer}.attn_k.weight", (kv_rows, HIDDEN), "Q4_1"),
            (f"blk.{layer}.attn_v.weight", (kv_rows, HIDDEN), "F16"),
            (f"blk.{layer}.attn_output.weight", (HIDDEN, HIDDEN), "Q4_1"),
            (f"blk.{layer}.ffn_gate.weight", (INNER, HIDDEN), "Q4_1"),
            (f"blk.{layer}.ffn_up.weight", (INNER, HIDDEN), "Q4_1"),
            (f"blk.{layer}.ffn_down.weight", (HIDDEN, INNER), "Q4_1"),
        ]
    return [*rows, ("output_norm.weight", (HIDDEN,), "F32")]
