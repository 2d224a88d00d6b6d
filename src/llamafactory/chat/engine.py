"""What an inference engine is, and what goes in and out of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from llamafactory.hparams.generation import GenerationConfig
    from llamafactory.hparams.run_config import RunConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One finished answer (field names as LLaMA Factory's).

    Attributes:
        response_text: the answer without its stop.
        response_length: tokens generated, the stop among them.
        prompt_length: tokens of the prompt.
        finish_reason: `stop` where the model ended the answer, `length` where the limit did.
    """

    response_text: str
    response_length: int
    prompt_length: int
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of a streamed answer; the last one carries the reason why it ended."""

    text: str
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """Generates tokens for one prompt. Built from a `RunConfig` by the class `Engine` of `chat/engines/<name>.py`."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that the model's own generation config names as ends."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], generation: GenerationConfig, *, stop_ids: frozenset[int], seed: int | None
    ) -> Iterator[Piece]:
        """Yields the answer piece by piece; closing the iterator stops the generation.

        Args:
            prompt_ids: token ids of history and generation prompt.
            generation: sampling options.
            stop_ids: token ids that end the answer; they are not part of its text.
            seed: of the sampling, or None for a fresh one.
        """
        ...


def load_engine(cfg: RunConfig) -> Engine:
    """Loads the engine named `infer_backend`."""
    module = importlib.import_module(f"llamafactory.chat.engines.{cfg.model.infer_backend}")
    return module.Engine(cfg)
