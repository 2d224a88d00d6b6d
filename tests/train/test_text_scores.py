"""ROUGE and BLEU against the libraries and against figures that a person can count."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from llamafactory.train.text_scores import NAMES, mean_scores, text_scores, words_of

PAIRS = [
    ("the cat sat on my mat", "the cat lay on a mat"),
    ("Rome", "The capital of Italy is Rome."),
    ("今天天气很好，我们去公园。", "今天天气不好，我们在家。"),
    ("北京是中国的首都", "中国的首都是北京。"),
    ("Das ist gut, 很好!", "Das war gut, 很好!"),
]


class _Spaces:
    def tokenize(self, text):
        return text.split()


def test_words_are_those_of_a_person():
    assert words_of("The quick fox, 今天天气很好。") == ["The", "quick", "fox", ",", "今天天气", "很", "好", "。"]
    assert words_of(" \n ") == []


def test_scores_that_can_be_counted():
    # words: 4 of 6 the same, in this order; pairs of words: "the cat" alone of 5
    assert text_scores(*PAIRS[0])[:3] == pytest.approx((400 / 6, 20, 400 / 6))
    # repeated words count as often as both texts have them: 2 of 4 and of 2
    assert text_scores("a a a a", "a a")[0] == pytest.approx(100 * 2 * (0.5 * 1) / 1.5)
    # characters: 3 of 4, 2 of 3, 1 of 2; no run of four, which smoothing takes as half of one
    assert text_scores("abcx", "abcd")[3] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


@pytest.mark.parametrize("pair", PAIRS)
def test_scores_are_those_of_the_libraries(pair):
    predicted, wanted = pair
    found = dict(zip(NAMES, text_scores(predicted, wanted), strict=True))
    spaced = [" ".join(words_of(text)) for text in pair]
    google = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Spaces()).score(spaced[1], spaced[0])
    for name, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        assert found[name] == pytest.approx(100 * google[theirs].fmeasure, abs=1e-9)
    with warnings.catch_warnings():  # escapes in its source of which Python warns when it is compiled
        warnings.simplefilter("ignore")
        from rouge_chinese import Rouge
    other: Any = Rouge().get_scores(spaced[0], spaced[1])[0]  # counts a repeated word once; these texts repeat none
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        assert found[name] == pytest.approx(100 * other[name]["f"], abs=1e-5), name
    bleu = sentence_bleu([list(wanted)], list(predicted), smoothing_function=SmoothingFunction().method3)
    assert found["bleu-4"] == pytest.approx(100 * bleu, abs=1e-9)


def test_the_same_text_has_all_and_an_empty_one_nothing():
    assert text_scores("今天天气很好。", "今天天气很好。") == pytest.approx((100, 100, 100, 100))
    assert text_scores("", "something here") == (0, 0, 0, 0)


def test_a_mean_leaves_out_rows_without_an_answer():
    assert mean_scores([("same text here", "same text here"), ("anything", ""), ("", "what")]) == {
        "rouge-1": 50.0, "rouge-2": 50.0, "rouge-l": 50.0, "bleu-4": 50.0,
    }  # fmt: skip
    assert mean_scores([("anything", " ")]) == {}
