r"""How a byte-level BPE tokenizer splits a text into words, as patterns of Python's `re`.

`\p{..}` is spelled out for a limited set of characters, so that a pattern holds only for texts of those. The *usual*
ones are common Latin characters and are known here. The *wide* ones are letters and signs of all scripts: to which
class each belongs is asked of the tokenizer's own engine, and if Python's tables differ, no wide text is split here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UPPER, _LOWER = "A-ZÀ-ÖØ-Þ", "a-zß-öø-ÿ"
_MORE_NUMBERS = "²³¹₀-₉"
_OTHERS = "–—‘’“”„•…€™£¥¢©®§¡¿«»°±·×÷−√∞≈≠≤≥→←′″✓"  # no letters, no digits, no white space
_USUAL = f"\\t\\n\\r\\x20-\\x7e{_UPPER}{_LOWER}{_MORE_NUMBERS}{_OTHERS}"
_UNUSUAL = re.compile(f"[^{_USUAL}]")
_USUAL_BYTES = bytes([*b"\t\n\r", *range(0x20, 0x7F)])
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
"""Members of Unicode categories among the usual characters."""
_LAST_WIDE = 0xFFFF
_NOT_WIDE = frozenset((*"ſK\ufb05\ufb06", *map(chr, range(0x1100, 0x1200))))
"""Letters that match others where a pattern ignores case, and parts of Hangul that NFC puts together."""

_ENDINGS = re.compile(r"\(\?i:'[a-z]{1,2}(?:\|'[a-z]{1,2})*\)\??")
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CUT_BY_SPACES = frozenset(
    (
        *_GPT2.split("|"), *_DIGITS.split("|"), *_GPT2_AFTER_DIGITS.split("|"), "<ending>", r"\p{N}{1,3}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+<ending>",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*<ending>",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
    )
)  # fmt: skip
r"""Alternatives in which a space comes first or in a run of white space, if at all; `<ending>`: see `_ENDINGS`.

Of a pattern of such, a single space between two characters that are no white space begins a word: what is before it
cannot reach over it, and nothing looks back. (`[^\p{N}]+` reaches over it, but only to leave it to the next pattern.)
"""
_RUNS = ("  ", " \n", "\n ", " \t", "\t ", " \r", "\r ")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordPatterns:
    """The patterns that split a text one after another, and the texts for which they hold.

    Attributes:
        stages: patterns without groups; each piece of one goes to the next.
        unusual: finds a character for which they do not hold.
        is_cut_by_spaces: a single space between two characters that are no white space begins a word.
    """

    stages: tuple[re.Pattern[str], ...]
    unusual: re.Pattern[str]
    is_cut_by_spaces: bool

    def split(self, text: str) -> list[str]:
        """The words of a text."""
        pieces = [text] if text else []
        for stage in self.stages:
            find = stage.findall
            pieces = find(pieces[0]) if len(pieces) == 1 else [word for piece in pieces for word in find(piece)]
        return pieces

    def cut(self, text: str) -> list[str]:
        """The text in parts whose words are those of the text: parts between single spaces where possible, else words.

        Cutting at spaces takes a tenth of the time of a pattern.
        """
        if not self.is_cut_by_spaces or text[-1:] == " ":
            return self.split(text)
        for run in _RUNS:
            if run in text:
                return self.split(text)
        return text.replace(" ", "\0 ").split("\0")


def is_usual(text: str) -> bool:
    """Whether a text has usual characters only."""
    if text.isascii():
        return not text.encode().translate(None, _USUAL_BYTES)
    return _UNUSUAL.search(text) is None


def usual_patterns(backend: Tokenizer) -> WordPatterns | None:
    """The patterns for usual texts; None where the tokenizer's words cannot be told from its parts."""
    regexes = _regexes(backend)
    return None if regexes is None else _compile(regexes, _CLASSES, _UNUSUAL)


def wide_patterns(backend: Tokenizer) -> WordPatterns | None:
    """The patterns for texts of all scripts; None where the engine puts characters into other classes than Python."""
    regexes = _regexes(backend)
    if regexes is None:
        return None
    names = {name for regex in regexes for name in re.findall(r"\\p\{(\w+)\}", regex)}
    by_category = _wide_characters()
    if not all(_engine_agrees(name, by_category) for name in sorted(names)):
        return None
    members = {
        name: usual + _ranges(char for key, chars in by_category.items() if key.startswith(name) for char in chars)
        for name, usual in _CLASSES.items()
    }
    everything = _ranges(char for chars in by_category.values() for char in chars)
    return _compile(regexes, members, re.compile(f"[^{_USUAL}{everything}]"))


@cache
def _wide_characters() -> Mapping[str, str]:
    """Letters, punctuation and symbols beyond ASCII that NFC leaves as they are, by Unicode category."""
    found: dict[str, list[str]] = {}
    for char in map(chr, range(0x80, _LAST_WIDE + 1)):
        category = unicodedata.category(char)
        if category[0] in "LPS" and char not in _NOT_WIDE and unicodedata.is_normalized("NFC", char):
            found.setdefault(category, []).append(char)
    return {category: "".join(chars) for category, chars in found.items()}


def _engine_agrees(name: str, by_category: Mapping[str, str]) -> bool:
    r"""Whether the engine finds in `\p{name}` the characters that Python's tables say."""
    from tokenizers import Regex, normalizers

    members = "".join(chars for key, chars in by_category.items() if key.startswith(name))
    others = "".join(chars for key, chars in by_category.items() if not key.startswith(name))
    return normalizers.Replace(Regex(f"\\p{{{name}}}+"), "").normalize_str(members + others) == others


def _ranges(chars: Iterable[str]) -> str:
    """The characters as the inside of a character class."""
    out: list[list[int]] = []
    for code in sorted(map(ord, chars)):
        if out and code == out[-1][1] + 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in out)


def _regexes(backend: Tokenizer) -> list[str] | None:
    """The patterns that split a text, as the tokenizer has them; None where they are not all known here."""
    from tokenizers.models import BPE

    model, normalizer, splitter = backend.model, _describe(backend.normalizer), _describe(backend.pre_tokenizer)
    if not isinstance(model, BPE) or model.dropout or normalizer.get("type") not in (None, "NFC"):
        return None
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    found = [_regex(step) for step in steps]
    regexes = [regex for regex in found if regex]
    if None in found:
        return None
    return [_GPT2_AFTER_DIGITS] if regexes == [_DIGITS, _GPT2] else regexes


def _describe(part: Any) -> Mapping[str, Any]:
    """A normalizer or pre-tokenizer as JSON, in the form of `tokenizer.json`; empty where there is none."""
    return {} if part is None else json.loads(part.__getstate__())


def _regex(step: Mapping[str, Any]) -> str | None:
    """What one step of a pre-tokenizer splits by; empty where it does not split, None where it is not known."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return _GPT2 if splits else ""
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return regex
        case _:
            return None


def _compile(regexes: Sequence[str], classes: Mapping[str, str], unusual: re.Pattern[str]) -> WordPatterns | None:
    patterns = [_spell(regex, classes) for regex in regexes]
    alternatives = {part for regex in regexes for part in _ENDINGS.sub("<ending>", regex).split("|")}
    try:
        stages = tuple(re.compile(pattern, re.ASCII) for pattern in patterns if pattern is not None)
    except re.error:
        return None
    if len(stages) < len(regexes):
        return None
    return WordPatterns(
        stages=stages, unusual=unusual, is_cut_by_spaces=bool(stages) and alternatives <= _CUT_BY_SPACES
    )


def _spell(regex: str, classes: Mapping[str, str]) -> str | None:
    r"""The pattern with `\p{..}` spelled out; None where that is not possible."""
    out: list[str] = []
    place, is_class = 0, False
    while place < len(regex):
        if regex.startswith("\\p{", place):
            end = regex.find("}", place)
            members = classes.get(regex[place + 3 : end])
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
