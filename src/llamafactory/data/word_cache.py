"""Token ids of many texts at once; a word that occurred before is looked up instead of tokenised again.

A byte-level BPE tokenizer splits a text into words by a pattern and tokenises each word by itself, so the ids of a
text are those of its words, end to end, and those of any part that begins and ends with a word are always the same.
Parts are found here (see `word_patterns`), and only new ones go to the Rust tokenizer. A text of other characters, and
every tokenizer that is built otherwise, goes to it whole. What is found here is compared with the Rust tokenizer when
a `WordEncoder` is made, and again for one text of each batch; after a difference, everything goes to it whole.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from llamafactory.data.word_patterns import WordPatterns, is_usual, usual_patterns, wide_patterns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    Ids = array[int]

_MOST_PARTS = 1 << 18
_TEXTS_AT_ONCE = 32
"""As many as a processor's own cache holds in parts."""
_WORTH_TABLES = 100_000
"""Characters of unusual texts after which the tables of all scripts, some 50 ms of work, pay."""

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
    """Encodes texts part by part; made by `word_encoder`.

    Attributes:
        is_trusted: False once parts gave other ids than the tokenizer; from then on they are not used.
    """

    def __init__(self, backend: Tokenizer, patterns: WordPatterns) -> None:
        """Takes the tokenizer and the patterns that split a text into words."""
        self.is_trusted = True
        self._backend = backend
        self._usual = patterns
        self._wide: WordPatterns | None = None
        self._num_unusual = 0
        self._markup, tokens, self._others = _added_tokens(backend)
        self._tokens = {"": b"", **tokens}
        self._ids = dict(self._tokens)
        self._forgotten: set[str] = set()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text (int32), without the special tokens that a post-processor would add."""
        if not self.is_trusted:
            return self._rust(texts)
        encoded: list[Ids] = []
        seldom: set[str] = set()
        longest = -1
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            parts = [self._cut(text) for text in some]
            whole = iter(self._rust([text for text, found in zip(some, parts, strict=True) if found is None]))
            seldom.update(self._learn(parts))
            ids = self._ids
            for place, found in enumerate(parts, first):
                if found is None:
                    encoded.append(next(whole))
                    continue
                encoded.append(array("i", b"".join([ids[part] for part in found])))
                if longest < 0 or len(texts[place]) > len(texts[longest]):
                    longest = place
        if longest >= 0 and self._rust([texts[longest]])[0] != encoded[longest]:
            self.is_trusted = False
            return self._rust(texts)
        self._forget(seldom)
        return encoded

    def _forget(self, seldom: set[str]) -> None:
        """Drops parts that occurred once in this batch, and were not dropped after the last one."""
        for part in seldom - self._forgotten:
            del self._ids[part]
        self._forgotten = seldom - self._forgotten
        if len(self._ids) > _MOST_PARTS:
            self._ids = dict(self._tokens)

    def _cut(self, text: str) -> list[str] | None:
        """Parts and added tokens of a text, or None where the Rust tokenizer must find them."""
        patterns: WordPatterns | None = self._usual
        if not is_usual(text):
            patterns = self._patterns_for(text)
        if patterns is None or (self._others and self._others.search(text)):
            return None
        if self._markup is None:
            return patterns.cut(text)
        parts: list[str] = []
        ids = self._ids
        for place, piece in enumerate(self._markup.split(text)):
            parts += (piece,) if place % 2 or piece in ids else patterns.cut(piece)
        return parts

    def _patterns_for(self, text: str) -> WordPatterns | None:
        """The patterns for a text with unusual characters; made when there was enough of such text."""
        before = self._num_unusual
        self._num_unusual += len(text)
        if before < _WORTH_TABLES <= self._num_unusual:
            self._wide = wide_patterns(self._backend)
        return None if self._wide is None or self._wide.unusual.search(text) else self._wide

    def _learn(self, parts: Sequence[list[str] | None]) -> list[str]:
        """Makes the ids of new parts; returns those that occur once, which are not worth their memory."""
        ids = self._ids
        counts = Counter([part for found in parts if found for part in found if part not in ids])
        if not counts:
            return []
        split = (self._wide or self._usual).split
        words = {part: split(part) for part in counts}
        new = list(set(chain.from_iterable(words.values())).difference(ids))
        ids.update(zip(new, [found.tobytes() for found in self._rust(new)], strict=True))
        seldom: list[str] = []
        for part, found in words.items():
            if part not in ids:
                ids[part] = b"".join([ids[word] for word in found])
                if counts[part] == 1:
                    seldom.append(part)
        return seldom

    def _rust(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", encoding.ids) for encoding in found]


def word_encoder(backend: Tokenizer) -> WordEncoder | None:
    """An encoder of words for this tokenizer, or None where its words cannot be told from its parts."""
    patterns = usual_patterns(backend)
    if patterns is None:
        return None
    encoder = WordEncoder(backend, patterns)
    for probe in (*_PROBES, "".join(_PROBES)):  # each by itself, so that each is compared
        encoder.encode_batch([probe])
    return encoder if encoder.is_trusted else None


def _added_tokens(backend: Tokenizer) -> tuple[re.Pattern[str] | None, dict[str, bytes], re.Pattern[str] | None]:
    """Added tokens that split a text wherever they stand: pattern (one group) and ids; and a pattern of the others."""
    plain: dict[str, bytes] = {}
    others: list[str] = []
    for number, token in backend.get_added_tokens_decoder().items():
        is_plain = not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        if is_plain:
            plain[token.content] = array("i", [number]).tobytes()
        else:
            others.append(token.content)
    return _any_of(plain), plain, _any_of(others)


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of one group that finds the words, longest first."""
    longest_first = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(word) for word in longest_first) + ")") if longest_first else None
