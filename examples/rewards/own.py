"""A reward function of your own: named `examples/rewards/own.py:right_and_short` in a config."""

import re


def right_and_short(completions, answers):
    """1 for the row's number, half for any number, and a little less for every character more than 20."""
    rewards = []
    for text, answer in zip(completions, answers, strict=True):
        numbers = re.findall(r"-?\d+", text)
        found = 1.0 if numbers[-1:] == [answer] else 0.5 if numbers else 0.0
        rewards.append(found - 0.01 * min(max(len(text) - 20, 0), 50))
    return rewards
