"""Groups of answers with every awkward shape, and tiny models to run them on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llamafactory.data.answer_batch import AnswerGroup
from llamafactory.data.types import IGNORE_INDEX, Example


def example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    labels = np.array([*[IGNORE_INDEX] * len(prompt), *answer], dtype=np.int32)
    return Example(input_ids=ids, labels=labels)


@pytest.fixture(scope="session")
def groups() -> list[AnswerGroup]:
    """Pairs: usual ones, another boundary, equal answers, an empty prompt, an empty answer, equal beginnings."""
    rng = np.random.default_rng(3)

    def ids(count: int) -> list[int]:
        return rng.integers(1, 96, count).tolist()

    same, begin, prompt = ids(6), ids(3), ids(17)
    pairs = [
        (ids(21), ids(21)), (same, list(same)), (ids(4), ids(11)), (ids(9), ids(2)), (ids(8), []),
        ([*begin, *ids(4)], [*begin, *ids(6)]), (ids(1), ids(1)), (ids(13), ids(7)),
    ]  # fmt: skip
    prompts = [ids(12), ids(9), [], prompt, ids(5), ids(7), ids(30), ids(3)]
    made = []
    for number, (shared, (chosen, rejected)) in enumerate(zip(prompts, pairs, strict=True)):
        other = [*shared[:-2], *ids(1)] if number == 3 else shared  # its last tokens merged in another way
        made.append(
            AnswerGroup(
                answers=(example(shared, chosen), example(other, rejected)), is_desirable=(number % 3 != 1,) * 2
            )
        )
    return made


@pytest.fixture(scope="session")
def make_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a tiny model of the same weights each time: `make_model("mistral", sliding_window=6)`."""

    def make(model_type: str = "llama", **changes: Any) -> Any:
        from transformers import AutoModelForCausalLM

        from llamafactory.model import attention

        attention.register()
        torch.manual_seed(5)
        config = tiny_config(model_type, **changes)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)

    return make


@pytest.fixture(scope="session")
def plan() -> Any:
    """What losses read of a plan."""
    return SimpleNamespace(fused_head=True, loss_chunk_rows=7, fused_blocks=False)
