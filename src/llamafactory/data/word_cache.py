"""Token ids of many texts at once; a word that occurred before is looked up instead of tokenised again.

A byte-level BPE tokenizer splits a text into words by a pattern and tokenises each word by itself, so the ids of a
text are those of its words, end to end. For texts of common Latin characters the words are found here, by the
tokenizer's own pattern, and only new words go to the Rust tokenizer. Every other text, and every tokenizer that is
built otherwise, goes to it whole. What is found here is compared with the Rust tokenizer when a `WordEncoder` is made,
and again for one text of each batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOST_WORDS = 1 << 20
_UPPER, _LOWER = "A-ZÀ-ÖØ-Þ", "a-zß-öø-ÿ"
_MORE_NUMBERS = "²³¹₀-₉"
_OTHERS = "–—‘’“”„•…€™£¥¢©®§¡¿«»°±·×÷−√∞≈≠≤≥→←′″✓"  # no letters, no digits, no white space
_UNUSUAL = re.compile(f"[^\\t\\n\\r\\x20-\\x7e{_UPPER}{_LOWER}{_MORE_NUMBERS}{_OTHERS}]")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}|[^\p{N}]+"
_GPT2_AFTER_DIGITS = r"\p{N}|" + _GPT2.replace(r"(?!\S)", r"(?![^\s\p{N}])")  # both at once: a digit ends a piece
_CLASSES: Mapping[str, str] = {
    "L": _UPPER + _LOWER,
    "Lu": _UPPER,
    "Ll": _LOWER,
    "N": "0-9" + _MORE_NUMBERS,
    "Nd": "0-9",
    "No": _MORE_NUMBERS,
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Nl"), ""),
}
"""Members of Unicode categories among the characters that `_UNUSUAL` lets pass."""

_PROBES = (
    "The capital of France is Paris. I'm sure they've said so; we'll see, won't we? IT'S JOHN'S.",
    "  two  spaces,\ttabs\t\tand\n\nlines \n with blanks \r\n\r\n at  12 345 678,9 places  ",
    "def f(x):\n    return x**2  # (a+b)*[c] != {d}\n\n\tprint('%s' % \"q\")\n",
    "https://example.org/a_b-c?d=e&f=1.5#G ... !!! ??? ~/dir $HOME \\n \\\\ @user <tag/> <|x|>",
    "Crème brûlée – “naïve” façade… Ünïcode’s ÀÉÎ: 3 € • 100 %; 20 °C², H₂O x² 1² ± ×3÷2≈4 →«ok»¿¡",
    "x=1;y=22;z=333;w=4444",
    " leading", "trailing ", "\n", " ", "a", "'", "''s 's'S 'LL 'Re", "1 2  3   4    5", "A1b2C3 a1 1a",
)  # fmt: skip


class WordEncoder:
    """Encodes texts word by word; made by `word_encoder`."""

    def __init__(self, backend: Tokenizer, stages: Sequence[re.Pattern[str]]) -> None:
        """Takes the tokenizer and the patterns that split a text into words, one after another."""
        self._backend = backend
        self._stages = stages
        self._markup, self._tokens, self._unusual = _added_tokens(backend)
        self._ids: dict[str, Sequence[int]] = dict(self._tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the special tokens that a post-processor would add.

        Raises:
            AssertionError: the words of a text give other ids than the Rust tokenizer; nothing is returned then.
        """
        words = [self._split(text) for text in texts]
        whole = iter(self._rust([text for text, found in zip(texts, words, strict=True) if found is None]))
        self._learn(words)
        ids = self._ids
        encoded = [
            next(whole) if found is None else list(chain.from_iterable([ids[word] for word in found]))
            for found in words
        ]
        self._compare(texts, words, encoded)
        if len(ids) > _MOST_WORDS:
            self._ids = dict(self._tokens)
        return encoded

    def _split(self, text: str) -> list[str] | None:
        """Words and added tokens of a text, or None where the Rust tokenizer must find them."""
        if _UNUSUAL.search(text) or (self._unusual and self._unusual.search(text)):
            return None
        if self._markup is None:
            return self._words(text)
        words: list[str] = []
        for place, piece in enumerate(self._markup.split(text)):
            words += [piece] if place % 2 else self._words(piece)
        return words

    def _words(self, text: str) -> list[str]:
        pieces = [text] if text else []
        for stage in self._stages:
            find = stage.findall
            pieces = find(pieces[0]) if len(pieces) == 1 else [word for piece in pieces for word in find(piece)]
        return pieces

    def _learn(self, words: Sequence[list[str] | None]) -> None:
        """Tokenises the words that are new."""
        new = set(chain.from_iterable([found for found in words if found])).difference(self._ids)
        plain = list(new)
        self._ids.update(zip(plain, self._rust(plain), strict=True))

    def _compare(self, texts: Sequence[str], words: Sequence[list[str] | None], encoded: Sequence[list[int]]) -> None:
        """Holds the longest text that was taken apart here against the Rust tokenizer."""
        found = [number for number, these in enumerate(words) if these is not None]
        if not found:
            return
        number = max(found, key=lambda index: len(texts[index]))
        if self._rust([texts[number]])[0] != encoded[number]:
            raise AssertionError("words give other token ids than the tokenizer; please report the tokenizer's name")

    def _rust(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def word_encoder(backend: Tokenizer) -> WordEncoder | None:
    """An encoder of words for this tokenizer, or None where its words cannot be told from its parts."""
    stages = _stages(backend)
    if stages is None:
        return None
    encoder = WordEncoder(backend, stages)
    try:
        for probe in (*_PROBES, "".join(_PROBES)):  # each by itself, so that each is compared
            encoder.encode_batch([probe])
    except AssertionError:
        return None
    return encoder


def _stages(backend: Tokenizer) -> list[re.Pattern[str]] | None:
    """The patterns that split a text, or None where they are not all known here."""
    from tokenizers.models import BPE

    model, normalizer, splitter = backend.model, _describe(backend.normalizer), _describe(backend.pre_tokenizer)
    if not isinstance(model, BPE) or model.dropout or normalizer.get("type") not in (None, "NFC"):
        return None
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    patterns = [_pattern(step) for step in steps]
    if None in patterns:
        return None
    if patterns == [_latin(_DIGITS), _latin(_GPT2)]:
        patterns = [_latin(_GPT2_AFTER_DIGITS)]
    try:
        return [re.compile(pattern, re.ASCII) for pattern in patterns if pattern]
    except re.error:
        return None


def _describe(part: Any) -> Mapping[str, Any]:
    """A normalizer or pre-tokenizer as JSON, in the form of `tokenizer.json`; empty where there is none."""
    return {} if part is None else json.loads(part.__getstate__())


def _pattern(step: Mapping[str, Any]) -> str | None:
    """What one step of a pre-tokenizer splits by; empty where it does not split, None where it is not known."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return _latin(_GPT2) if splits else ""
        case {"type": "Digits", "individual_digits": True}:
            return _latin(_DIGITS)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return _latin(regex)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return _latin(regex)
        case _:
            return None


def _latin(regex: str) -> str | None:
    r"""The pattern with `\p{..}` spelled out, for texts that `_UNUSUAL` lets pass; None where that is not possible."""
    out: list[str] = []
    place, is_class = 0, False
    while place < len(regex):
        if regex.startswith("\\p{", place):
            end = regex.find("}", place)
            members = _CLASSES.get(regex[place + 3 : end])
            if members is None or not (members or is_class):
                return None
            out.append(members if is_class else f"[{members}]")
            place = end + 1
            continue
        if regex.startswith("\\P", place) or (regex[place] == "(" and not regex.startswith("(?", place)):
            return None  # findall returns groups
        width = 2 if regex[place] == "\\" else 1
        if width == 1 and regex[place] in "[]":
            is_class = regex[place] == "["
        out.append(regex[place : place + width])
        place += width
    return None if "[]" in "".join(out) else "".join(out)


def _added_tokens(backend: Tokenizer) -> tuple[re.Pattern[str] | None, dict[str, list[int]], re.Pattern[str] | None]:
    """Added tokens that split a text wherever they stand: pattern (one group) and ids; and a pattern of the others."""
    plain: dict[str, list[int]] = {}
    others: list[str] = []
    for number, token in backend.get_added_tokens_decoder().items():
        is_plain = not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        if is_plain:
            plain[token.content] = [number]
        else:
            others.append(token.content)
    return _any_of(plain), plain, _any_of(others)


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of one group that finds the words, longest first."""
    longest_first = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(word) for word in longest_first) + ")") if longest_first else None
