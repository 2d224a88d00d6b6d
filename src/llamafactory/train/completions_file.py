"""A few sampled answers of each rollout in `completions.jsonl`, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamafactory.train.experience import Experience
from llamafactory.train.rewards.answer import Answer
from llamafactory.train.rewards.team import Scores

NAME = "completions.jsonl"


class CompletionsFile:
    """Appends answers; a resumed run first takes out what came after its checkpoint."""

    def __init__(self, folder: Path, *, limit: int, names: Sequence[str], done_steps: int) -> None:
        """Opens nothing yet.

        Args:
            folder: of the run.
            limit: answers of a rollout.
            names: of the rewards, as `Team.names` gives them.
            done_steps: of the checkpoint that is continued; 0 begins the file anew.
        """
        self._path, self._limit, self._names = folder / NAME, limit, list(names)
        kept: list[str] = []
        if done_steps and self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] < done_steps:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash cut in half
        if kept:
            self._path.write_text("\n".join(kept) + "\n", encoding="utf-8")
        else:
            self._path.unlink(missing_ok=True)

    def write(
        self, step: int, scored: Sequence[tuple[Sequence[Answer], Scores]], experiences: Sequence[Experience]
    ) -> None:
        """Appends the first answers of a rollout.

        Args:
            step: optimizer steps before it.
            scored: the answers to each prompt, and what they earned.
            experiences: of the same prompts, in the same order, with their advantages.
        """
        rows: list[str] = []
        for (answers, scores), experience in zip(scored, experiences, strict=True):
            starts = np.cumsum([0, *experience.lengths[:-1]])
            for place, answer in enumerate(answers):
                if len(rows) == self._limit:
                    break
                advantages = experience.advantages
                columns = dict(zip(self._names, scores.columns[place].tolist(), strict=True))
                row = {
                    "step": step,
                    "row": answer.row,
                    "prompt": answer.prompt,
                    "completion": answer.completion,
                    "reward": float(scores.total[place]),
                    **columns,
                    "advantage": None if advantages is None else float(advantages[starts[place]]),
                    "tokens": len(answer.completion_ids),
                    "stopped": answer.is_stopped,
                }
                rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(rows)
