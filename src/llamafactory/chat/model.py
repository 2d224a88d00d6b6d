"""ChatModel: messages in, answers out, rendered by the same template that training uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory.chat.engine import Piece, Response, load_engine
from llamafactory.data.encode import Encoder
from llamafactory.data.template_choice import end_token, template_of
from llamafactory.data.types import Conversation, Message, Turn
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.network import go_offline
from llamafactory.model.loader import load_tokenizer

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_ROLES = {"observation": "tool", "developer": "system"}


class ChatModel:
    """A loaded model to talk to. Answers are generated one after the other."""

    def __init__(self, cfg: RunConfig) -> None:
        """Loads model, adapters, tokenizer and template.

        Args:
            cfg: the resolved configuration.
        """
        if cfg.model.offline:
            go_offline()
        self.cfg = cfg
        self.tokenizer = load_tokenizer(cfg.model, eos_token=end_token(cfg.data.template))
        self.template = template_of(cfg.data, self.tokenizer)
        self.engine = load_engine(cfg)
        self._encoder = Encoder(self.tokenizer, is_whole=self.template.is_tokenized_whole)
        self.stop_ids = self._stop_ids()

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        system: str | None = None,
        tools: Sequence[Mapping[str, object]] = (),
        **options: Any,
    ) -> list[Response]:
        """Answers a dialogue.

        Args:
            messages: `{"role", "content"}` each; roles user, assistant, tool, and system first.
            system: system text, where `messages` holds none.
            tools: JSON-schema descriptions of functions.
            **options: keys of `GenerationConfig` that differ in this call, and `seed`.

        Returns:
            A list of one response.
        """
        prompt = self.prompt_ids(messages, system, tools)
        pieces = list(self.stream_pieces(prompt, **options))
        return [
            Response(
                response_text="".join(piece.text for piece in pieces),
                response_length=sum(piece.num_tokens for piece in pieces),
                prompt_length=len(prompt),
                finish_reason=pieces[-1].finish_reason or "length",
            )
        ]

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        system: str | None = None,
        tools: Sequence[Mapping[str, object]] = (),
        **options: Any,
    ) -> Iterator[str]:
        """As `chat`, one piece of text after the other."""
        for piece in self.stream_pieces(self.prompt_ids(messages, system, tools), **options):
            yield piece.text

    async def achat(self, *args: Any, **options: Any) -> list[Response]:
        """As `chat`, without blocking the event loop."""
        return await asyncio.to_thread(self.chat, *args, **options)

    async def astream_chat(self, *args: Any, **options: Any) -> AsyncIterator[str]:
        """As `stream_chat`, without blocking the event loop."""
        pieces = self.stream_chat(*args, **options)
        end = object()
        try:
            while (text := await asyncio.to_thread(next, pieces, end)) is not end:
                yield str(text)
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def stream_pieces(self, prompt_ids: Sequence[int], *, seed: int | None = None, **options: Any) -> Iterator[Piece]:
        """Generates from token ids.

        Args:
            prompt_ids: history and generation prompt.
            seed: of the sampling.
            **options: keys of `GenerationConfig` that differ in this call.
        """
        current = self.cfg.generation
        generation = type(current)(**{**current.model_dump(), **options}) if options else current
        return self.engine.stream(prompt_ids, generation, stop_ids=self.stop_ids, seed=seed)

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        system: str | None = None,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[int]:
        """Token ids of a dialogue and the generation prompt, as training saw them."""
        found = [Message(role=_role(row), content=row["content"]) for row in messages]
        if system is not None and not any(message.role == "system" for message in found):
            found.insert(0, Message(role="system", content=system))
        segments = self.template.render_prompt(Conversation(messages=tuple(found), tools=tuple(tools) or None))
        [[turn]] = self._encoder.encode([[Turn(prompt=segments, answer=(), message_index=0)]])
        return list(turn.prompt_ids)

    def _stop_ids(self) -> frozenset[int]:
        """The ends that tokenizer and model name, and the template's stop words that are one token."""
        vocabulary = self.tokenizer.get_vocab()
        words = [self.tokenizer.eos_token, *self.template.stop_words]
        return self.engine.end_ids | {vocabulary[word] for word in words if word in vocabulary}


def _role(row: Mapping[str, str]) -> Any:
    role = _ROLES.get(row.get("role", ""), row.get("role"))
    if role not in ("system", "user", "assistant", "tool") or not isinstance(row.get("content"), str):
        raise LlamaFactoryError(
            f"a message needs a role (system, user, assistant or tool) and a content text; found {sorted(row)} with "
            f"role {row.get('role')!r}"
        )
    return role
