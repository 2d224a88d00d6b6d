"""Ids found word by word are those of the Rust tokenizer, for every text and every splitting that is taken apart."""

from __future__ import annotations

import itertools
import re
import unicodedata
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llamafactory.data import word_cache, word_patterns
from llamafactory.data.word_cache import WordEncoder, word_encoder
from llamafactory.data.word_patterns import is_usual, usual_patterns, wide_patterns

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = (
    "The capital of France isn't Berlin; it's Paris!\n\n  def f(x):\n\treturn x ** 2 # 12,345.67\r\n"
    "Crème “brûlée” – ÀÉ"
)


def split(regex: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    steps = [pre_tokenizers.Split(Regex(regex), behavior, invert), byte_level(splits=False)]
    return pre_tokenizers.Sequence(steps)


def byte_level(*, splits: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)


SPLITTERS = {
    "gpt2": byte_level(splits=True),
    "digits, gpt2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(splits=True)]),
    "llama3": split(LLAMA3),
    "llama3, removed": split(LLAMA3, "removed", invert=True),
    "o200k": split(O200K),
    "digits, llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
         byte_level(splits=False)]
    ),
}  # fmt: skip


def train(splitter: Any) -> Tokenizer:
    """A small byte-level BPE tokenizer with two special tokens, one inside the other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|a|>", "<|a|><|b|>"]
    )
    tokenizer.train_from_iterator([LINES, LINES.lower()] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=sorted(SPLITTERS))
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return train(SPLITTERS[request.param])


def rust(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def found(encoder: WordEncoder, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode_batch(texts)]


LATIN = st.text(st.sampled_from(sorted(set(LINES) | set("<|ab>'sSTtREdDlLmMvV 019²₂°×→_~€•™…\t\r\n"))), max_size=40)
ANY = st.text(max_size=20)


@given(texts=st.lists(LATIN | ANY | st.sampled_from(["<|a|>", "<|a|><|b|>x", "a<|a|>"]), max_size=6))
def test_words_give_the_ids_of_the_tokenizer(backend: Tokenizer, texts: list[str]) -> None:
    encoder = word_encoder(backend)
    assert encoder is not None
    assert found(encoder, texts) == rust(backend, texts)
    assert found(encoder, texts) == rust(backend, texts)  # all words are known now
    assert encoder.is_trusted


def test_the_embedded_tokenizer_is_taken_apart(embedded_model_dir: Path, shared_dir: Path) -> None:
    import json

    tokenizer = Tokenizer.from_file(str(embedded_model_dir / "tokenizer.json"))
    encoder = word_encoder(tokenizer)
    assert encoder is not None
    rows = json.loads((shared_dir / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [f"<|im_start|>user\n{row['instruction']}<|im_end|>\n{row['output']}" for row in rows]
    assert found(encoder, texts) == rust(tokenizer, texts)


def test_few_words_go_to_the_tokenizer_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = word_encoder(train(SPLITTERS["gpt2"]))
    assert encoder is not None
    encoder.encode_batch([LINES])
    asked: list[str] = []
    real = WordEncoder._rust
    monkeypatch.setattr(WordEncoder, "_rust", lambda self, texts: asked.extend(texts) or real(self, texts))
    encoder.encode_batch([LINES + " Paris"])
    assert asked == [LINES + " Paris"]  # the comparison alone


def test_the_cache_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MOST_PARTS", 10)
    backend = train(SPLITTERS["gpt2"])
    encoder = word_encoder(backend)
    assert encoder is not None
    for number in range(30):
        assert found(encoder, [f"w{number} x{number}"]) == rust(backend, [f"w{number} x{number}"])
    assert len(encoder._ids) < 20


def test_a_wrong_pattern_is_caught_when_the_encoder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_patterns, "_GPT2", r"\w+|\W+")
    assert word_encoder(train(SPLITTERS["gpt2"])) is None


def test_a_wrong_word_is_caught_in_its_batch_and_no_word_is_used_again() -> None:
    backend = train(SPLITTERS["gpt2"])
    encoder = word_encoder(backend)
    assert encoder is not None
    encoder._ids["Paris"] = array("i", [0]).tobytes()
    assert found(encoder, ["x", "Paris"]) == rust(backend, ["x", "Paris"])
    assert not encoder.is_trusted
    encoder._ids["a"] = array("i", [0]).tobytes()
    assert found(encoder, ["a", "a long text that is compared"]) == rust(
        backend, ["a", "a long text that is compared"]
    )


@pytest.mark.parametrize("name", sorted(SPLITTERS))
def test_texts_are_cut_at_spaces_where_the_pattern_is_known(name: str) -> None:
    patterns = usual_patterns(train(SPLITTERS[name]))
    assert patterns is not None
    assert patterns.is_cut_by_spaces
    unknown = usual_patterns(train(split(r"[a-z]+ [a-z]+|\s+|\S+")))  # a space inside a word
    assert unknown is not None
    assert not unknown.is_cut_by_spaces


@pytest.mark.parametrize("name", sorted(SPLITTERS))
def test_parts_between_spaces_have_the_words_of_the_text(name: str) -> None:
    """All texts of five characters around a space, one of each kind that patterns tell apart."""
    patterns = usual_patterns(train(SPLITTERS[name]))
    assert patterns is not None
    kinds = ["a", "É", "s", "1", "²", ".", "/", "'", "\n", "\t", " "]
    for left in itertools.product(kinds, repeat=2):
        for right in itertools.product(kinds, repeat=2):
            text = "".join((*left, " ", *right))
            parts = patterns.cut(text)
            assert "".join(parts) == text
            words = [word for part in parts for word in patterns.split(part)]
            if name.startswith("digits, l"):  # white space before a digit may stand with either pattern
                assert "".join(words) == text
            else:
                assert words == patterns.split(text), text


def test_texts_of_all_scripts_are_taken_apart_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_WORTH_TABLES", 20)
    texts = [
        "Ἀθῆναι und Москва, Київ",
        "东京 is 東京。 “学习”",
        "한국어 단어 ok",
        "ſ's ǅ ʰ K 'ſ",
        "x\u0301 a\u00a0b\u3000c",
        "🙂 ok",
        "ᄀ" + "ᅡ",
    ]
    for name in ("gpt2", "llama3", "o200k", "digits, gpt2"):
        backend = train(SPLITTERS[name])
        backend.normalizer = normalizers.NFC()
        encoder = word_encoder(backend)
        assert encoder is not None
        for _ in range(3):
            assert found(encoder, texts) == rust(backend, texts)
        assert encoder._wide is not None
        assert [encoder._cut(text) is not None for text in texts] == [True, True, True, False, False, False, False]


@given(
    texts=st.lists(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=30), max_size=4)
)
def test_wide_texts_give_the_ids_of_the_tokenizer(wide_encoder: WordEncoder, texts: list[str]) -> None:
    assert found(wide_encoder, texts) == rust(wide_encoder._backend, texts)
    assert wide_encoder.is_trusted


@pytest.fixture(scope="module", params=["gpt2", "llama3", "o200k", "digits, gpt2"])
def wide_encoder(request: pytest.FixtureRequest) -> WordEncoder:
    backend = train(SPLITTERS[request.param])
    backend.normalizer = normalizers.NFC()
    encoder = word_encoder(backend)
    assert encoder is not None
    encoder.encode_batch(["Москва" * 20_000])
    assert encoder._wide is not None
    return encoder


def test_no_wide_character_joins_the_one_before_it() -> None:
    """NFC changes no text of wide characters: each is stable, and none is the second of a composition."""
    seconds = set()
    for code in range(0x110000):
        fields = unicodedata.decomposition(chr(code)).split()
        if len(fields) == 2 and not fields[0].startswith("<"):
            seconds.add(chr(int(fields[1], 16)))
    wide = set("".join(word_patterns._wide_characters().values()))
    assert not wide & seconds
    assert not any(0x1100 <= ord(char) < 0x1200 for char in wide)


def test_an_engine_with_other_tables_splits_no_wide_text(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = train(SPLITTERS["gpt2"])
    assert wide_patterns(backend) is not None
    monkeypatch.setattr(word_patterns, "_wide_characters", lambda: {"Lo": "学・", "Po": "。"})  # the dot is no letter
    assert wide_patterns(backend) is None


def test_parts_that_occur_once_are_not_kept() -> None:
    encoder = word_encoder(train(SPLITTERS["gpt2"]))
    assert encoder is not None
    encoder.encode_batch(["once x twice-y twice-y end"])
    assert " twice-y" in encoder._ids
    encoder.encode_batch(["a b-c d"])
    assert " b-c" not in encoder._ids
    encoder.encode_batch(["a b-c d"])
    assert " b-c" in encoder._ids


@pytest.mark.parametrize("make", ["prefix space", "lowercase", "unigram", "unknown class", "group"])
def test_other_tokenizers_are_left_alone(make: str) -> None:
    tokenizer = train(SPLITTERS["gpt2"])
    match make:
        case "prefix space":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "lowercase":
            tokenizer.normalizer = normalizers.Lowercase()
        case "unigram":
            tokenizer = Tokenizer(models.Unigram([("a", -1.0)], None, False))
            tokenizer.pre_tokenizer = byte_level(splits=True)
        case "unknown class":
            tokenizer.pre_tokenizer = split(r"\p{Han}+|\s+|\S+")
        case _:
            tokenizer.pre_tokenizer = split(r"(a)|\s+|\S+")
    assert word_encoder(tokenizer) is None


def test_tokens_that_take_spaces_with_them_go_to_the_tokenizer() -> None:
    tokenizer = train(SPLITTERS["gpt2"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens(["word"])
    encoder = word_encoder(tokenizer)
    assert encoder is not None
    texts = ["a  <mask>  b", "my word is", "sword", "plain"]
    assert found(encoder, texts) == rust(tokenizer, texts)


def test_letters_of_the_usual_characters_are_letters_in_unicode_too() -> None:
    usual = [chr(code) for code in range(0x10000) if is_usual(chr(code))]
    letters, numbers = (re.compile(f"[{word_patterns._CLASSES[name]}]") for name in "LN")
    for char in usual:
        category = unicodedata.category(char)
        assert bool(letters.match(char)) == category.startswith("L"), char
        assert bool(numbers.match(char)) == category.startswith("N"), char
        assert category[0] in "LPSN" or char in " \t\n\r", char
        assert unicodedata.normalize("NFC", char) == char
