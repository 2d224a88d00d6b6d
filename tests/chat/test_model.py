"""ChatModel on a tiny model: the prompt is the template's, the stream is the answer, and nothing hangs."""

from __future__ import annotations

import asyncio
import io
import threading

import pytest
import torch

from llamafactory.chat import repl
from llamafactory.chat.model import ChatModel
from llamafactory.compose import load_config
from llamafactory.extras.errors import LlamaFactoryError

MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    options = {"model_name_or_path": str(tiny_model_dir), "do_sample": False, "max_new_tokens": 12}
    return ChatModel(load_config(options, command="chat"))


def test_the_prompt_is_that_of_the_tokenizer(model):
    history = [*MESSAGES, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye <|im_end|>?"}]
    plain = [{**message, "content": message["content"].replace("<|im_end|>", "")} for message in history]
    expected = model.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert model.prompt_ids(plain) == expected
    assert model.prompt_ids(history).count(model.tokenizer.eos_token_id) == expected.count(
        model.tokenizer.eos_token_id
    )


def test_a_stream_joins_to_the_answer_of_generate(model):
    prompt = model.prompt_ids(MESSAGES)
    ids = torch.tensor([prompt])
    expected = model.engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=sorted(model.stop_ids), pad_token_id=model.tokenizer.pad_token_id,
    )[0, len(prompt) :]  # fmt: skip
    text = model.tokenizer.decode(expected, skip_special_tokens=True)
    [response] = model.chat(MESSAGES)
    assert response.response_text == text == "".join(model.stream_chat(MESSAGES))
    assert response.response_length == len(expected)
    assert response.prompt_length == len(prompt)
    assert response.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(model):
    prompt = model.prompt_ids(MESSAGES)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    first = int(model.engine.model.generate(torch.tensor([prompt]), **options)[0, -1])
    pieces = list(model.engine.stream(prompt, model.cfg.generation, stop_ids=frozenset({first}), seed=None))
    assert "".join(piece.text for piece in pieces) == ""
    assert pieces[-1].finish_reason == "stop"


def test_a_seed_repeats_the_sampling(model):
    options = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    texts = [model.chat(MESSAGES, seed=seed, **options)[0].response_text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_closing_a_stream_stops_its_thread(model):
    before = threading.active_count()
    stream = model.stream_chat(MESSAGES, max_new_tokens=5000)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert model.chat(MESSAGES)  # the engine is free again


def test_an_error_in_the_engine_reaches_the_reader(model, monkeypatch):
    def broken(**options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.engine.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.chat(MESSAGES)


def test_characters_are_never_split(model, monkeypatch):
    ids = model.tokenizer("你好 🙂 ça", add_special_tokens=False)["input_ids"]

    def speak(streamer, inputs, **options):
        streamer.put(inputs)
        for token in ids:
            streamer.put(inputs.new_tensor([token]))
        return inputs

    monkeypatch.setattr(model.engine.model, "generate", speak)
    pieces = list(model.stream_chat(MESSAGES))
    assert "".join(pieces) == "你好 🙂 ça"
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_async_forms_give_the_same(model):
    async def talk():
        parts = [text async for text in model.astream_chat(MESSAGES)]
        return (await model.achat(MESSAGES))[0].response_text, "".join(parts)

    answer, streamed = asyncio.run(talk())
    assert answer == streamed == model.chat(MESSAGES)[0].response_text


def test_a_message_without_a_known_role_is_refused(model):
    with pytest.raises(LlamaFactoryError, match="role 'robot'"):
        model.chat([{"role": "robot", "content": "beep"}])


def test_the_terminal_keeps_history_and_obeys_its_words(model, monkeypatch):
    lines = iter(["one", "two", "clear", "system Be brief.", "three", "", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    asked = []

    def stream_chat(messages, system=None):
        asked.append(([message["content"] for message in messages], system))
        yield "ok"

    monkeypatch.setattr(model, "stream_chat", stream_chat)
    out = io.StringIO()
    assert repl.talk(model, out) == 0
    assert asked == [(["one"], None), (["one", "ok", "two"], None), (["three"], "Be brief.")]
    assert out.getvalue().count("Assistant: ok") == 3


def test_the_terminal_ends_at_end_of_input_and_at_ctrl_c(model, monkeypatch):
    for error, code in ((EOFError, 0), (KeyboardInterrupt, 130)):

        def stop(prompt="", error=error):
            raise error

        monkeypatch.setattr("builtins.input", stop)
        assert repl.talk(model, io.StringIO()) == code
