"""A reward model behind HTTP: texts are posted as JSON, scores come back."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from llamafactory.extras import log
from llamafactory.train.rewards.answer import Answer, Score
from llamafactory.train.rewards.functions import RewardUnavailableError

_FIRST_WAIT = 1.0
_LARGEST_REPLY = 16 * 2**20


def service_score(url: str, *, timeout: float, retries: int, first_wait: float = _FIRST_WAIT) -> Score:
    """A score that asks a service.

    The request is `{"model": "model", "messages": [text, ...]}`, each text a prompt and its answer; the reply is
    `{"scores": [number, ...]}`, as LLaMA Factory's own API gives it.

    Args:
        url: http or https.
        timeout: seconds for one try.
        retries: further tries, each after twice the wait of the last.
        first_wait: seconds before the first of them.
    """

    def score(answers: Sequence[Answer]) -> Sequence[float]:
        texts = [answer.prompt + answer.completion for answer in answers]
        wait = first_wait
        for attempt in range(retries + 1):
            try:
                return _ask(url, texts, timeout)
            except (OSError, ValueError, TypeError, KeyError) as error:
                why = f"{type(error).__name__}: {error}"
                if attempt == retries:
                    raise RewardUnavailableError(
                        f"reward_model: {url} gave no scores in {retries + 1} tries; the last one ended with {why}\n"
                        "    fix:     start the service again and run the same command: it continues from the "
                        "checkpoint that is saved now"
                    ) from error
                log.warn(f"reward_model: {url}: {why}; trying again in {wait:g} s")
                time.sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")

    return score


def _ask(url: str, texts: Sequence[str], timeout: float) -> list[float]:
    body = json.dumps({"model": "model", "messages": list(texts)}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            document: Any = json.loads(reply.read(_LARGEST_REPLY))
    except urllib.error.HTTPError as error:
        error.close()
        raise
    scores = document["scores"]
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise ValueError(f"the reply holds no list of {len(texts)} scores")
    return [float(score) for score in scores]
