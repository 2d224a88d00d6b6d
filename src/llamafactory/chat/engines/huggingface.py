"""transformers' `generate` in a thread, streamed; stops when its reader goes away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig as HFGenerationConfig
from transformers import StoppingCriteria, StoppingCriteriaList

from llamafactory.chat.engine import Piece
from llamafactory.extras.hardware import read_hardware
from llamafactory.model.layout import stock_attention
from llamafactory.model.loader import adapter_folders, load_model, load_model_config, load_tokenizer
from llamafactory.model.method import apply_method
from llamafactory.model.plan import inference_dtype

if TYPE_CHECKING:
    from llamafactory.hparams.generation import GenerationConfig
    from llamafactory.hparams.run_config import RunConfig

_ATTENTION = {"disabled": "eager", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


class Engine:
    """One model in this process, one answer at a time."""

    def __init__(self, cfg: RunConfig) -> None:
        """Loads model and adapters onto the best device."""
        hardware = read_hardware(use_cpu=cfg.train.use_cpu)
        config = load_model_config(cfg.model)
        stored = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
        dtype = inference_dtype(cfg.model.infer_dtype, stored, hardware)
        attention = _ATTENTION.get(cfg.model.flash_attn) or stock_attention(config)
        base = load_model(cfg.model, dtype=dtype, attention=attention, device=hardware.device)
        self.model: Any = apply_method(
            base, cfg.train.finetuning_type, cfg.adapter_options, adapters=adapter_folders(cfg.model), trainable=False
        ).eval()
        self.tokenizer = load_tokenizer(cfg.model)
        self._uses_cache = cfg.model.use_kv_cache
        self._lock = threading.Lock()

    @property
    def end_ids(self) -> frozenset[int]:
        """See `Engine.end_ids` in `chat.engine`."""
        ends = self.model.generation_config.eos_token_id
        return frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)

    def stream(
        self, prompt_ids: Sequence[int], generation: GenerationConfig, *, stop_ids: frozenset[int], seed: int | None
    ) -> Iterator[Piece]:
        """See `Engine.stream` in `chat.engine`."""
        with self._lock:
            tokens = _TokenQueue(len(prompt_ids))
            worker = threading.Thread(
                target=self._generate, args=(list(prompt_ids), generation, stop_ids, seed, tokens), daemon=True
            )
            worker.start()
            try:
                yield from self._pieces(tokens, generation, stop_ids)
            finally:
                tokens.cancelled.set()
                worker.join()

    def _pieces(self, tokens: _TokenQueue, generation: GenerationConfig, stop_ids: frozenset[int]) -> Iterator[Piece]:
        """Turns ids into text that never splits a character."""
        ids: list[int] = []
        shown, unreported = "", 0
        reason = "length"
        while (token := tokens.next()) is not None:
            unreported += 1
            if token in stop_ids:
                reason = "stop"
                break
            ids.append(token)
            text = self._decode(ids, generation)
            if text.endswith("\ufffd") or not text.startswith(shown) or text == shown:
                continue
            yield Piece(text=text[len(shown) :], num_tokens=unreported)
            shown, unreported = text, 0
        text = self._decode(ids, generation)
        yield Piece(text=text[len(shown) :], num_tokens=unreported, finish_reason=reason)  # type: ignore[arg-type]

    def _decode(self, ids: list[int], generation: GenerationConfig) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=generation.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return cast("str", text)

    def _generate(
        self,
        prompt_ids: list[int],
        generation: GenerationConfig,
        stop_ids: frozenset[int],
        seed: int | None,
        tokens: _TokenQueue,
    ) -> None:
        """Runs in the worker thread; whatever happens, the reader gets an end or the error."""
        try:
            if seed is not None:
                torch.manual_seed(seed)
            inputs = torch.tensor([prompt_ids], device=self.model.device)
            with torch.inference_mode():
                output = self.model.generate(
                    inputs=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self._options(generation, stop_ids, len(prompt_ids)),
                    streamer=tokens if generation.num_beams == 1 else None,
                    stopping_criteria=StoppingCriteriaList([_Cancelled(tokens.cancelled)]),
                )
            if generation.num_beams > 1:
                tokens.put_all(output[0, len(prompt_ids) :].tolist())
            tokens.finish()
        except BaseException as error:  # handed to the reader, which raises it
            tokens.finish(error)

    def _options(self, generation: GenerationConfig, stop_ids: frozenset[int], num_prompt: int) -> HFGenerationConfig:
        sampling: dict[str, Any] = {}
        if generation.do_sample and generation.temperature > 0:
            sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
        new_tokens = generation.max_new_tokens
        return HFGenerationConfig(
            max_new_tokens=new_tokens if new_tokens > 0 else max(1, generation.max_length - num_prompt),
            do_sample=bool(sampling),
            num_beams=generation.num_beams,
            repetition_penalty=generation.repetition_penalty,
            length_penalty=generation.length_penalty,
            eos_token_id=sorted(stop_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=self._uses_cache,
            **sampling,
        )


class _TokenQueue:
    """A transformers streamer that hands ids from the worker to the reader."""

    def __init__(self, num_prompt: int) -> None:
        self.cancelled = threading.Event()
        self._queue: queue.Queue[int | BaseException | None] = queue.Queue()
        self._skip = num_prompt

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: the prompt first, then each new token."""
        ids = value.flatten().tolist()
        if self._skip:
            self._skip = max(0, self._skip - len(ids))
            return
        self.put_all(ids)

    def end(self) -> None:
        """Called by `generate` at its end; the worker says so itself."""

    def put_all(self, ids: list[int]) -> None:
        for token in ids:
            self._queue.put(token)

    def finish(self, error: BaseException | None = None) -> None:
        self._queue.put(error)

    def next(self) -> int | None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)
