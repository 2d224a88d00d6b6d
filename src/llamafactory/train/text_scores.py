"""How alike two texts are: ROUGE and BLEU, in percent, for any language that has spaces or Chinese characters.

ROUGE counts words as jieba finds them, with letters as they are; BLEU counts characters. Both libraries belong to the
extra `metrics`, and are imported by the first score.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from llamafactory.extras.files import user_cache_dir

NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def mean_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Mean scores of `(predicted, wanted)` texts, 0 to 100; pairs with nothing wanted are left out.

    Returns:
        `rouge-1`, `rouge-2` and `rouge-l`: F1 of words (Lin 2004). `bleu-4`: BLEU of characters of a single text
        (Papineni et al. 2002), smoothed by method 3 of Chen and Cherry (2014). Empty where no pair has a wanted text.
    """
    totals, count = [0.0] * len(NAMES), 0
    for predicted, wanted in pairs:
        if not wanted.strip():
            continue
        count += 1
        for place, value in enumerate(text_scores(predicted, wanted)):
            totals[place] += value
    return {name: round(total / count, 4) for name, total in zip(NAMES, totals, strict=True)} if count else {}


def text_scores(predicted: str, wanted: str) -> tuple[float, ...]:
    """The scores of one pair, in the order of `NAMES`, 0 to 100."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    found = _rouge().score(wanted, predicted)
    rouge = [found[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]
    bleu: Any = 0.0
    if predicted and wanted:
        bleu = sentence_bleu([list(wanted)], list(predicted), smoothing_function=SmoothingFunction().method3)
    return tuple(100.0 * float(value) for value in (*rouge, bleu))


def words_of(text: str) -> list[str]:
    """The words of a text: Chinese words from jieba's dictionary, other words between spaces and marks."""
    return [word for word in _cutter().lcut(text) if word.strip()]


class _Words:
    """The tokenizer that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


@cache
def _cutter() -> Any:
    """jieba, its dictionary kept in this user's own folder; any user may write into that of temporary files."""
    import logging
    import warnings

    with warnings.catch_warnings():  # its regular expressions hold escapes that Python warns of, the first time only
        warnings.simplefilter("ignore")
        import jieba

    jieba.setLogLevel(logging.CRITICAL)
    cutter: Any = jieba.Tokenizer()
    folder = user_cache_dir() / "jieba"
    with suppress(OSError):  # without the folder the dictionary is read anew, which takes a second
        folder.mkdir(parents=True, exist_ok=True)
    cutter.tmp_dir = str(folder)
    return cutter
