"""Loss curves as PNG files, raw and smoothed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory.extras import log


def plot_curves(output_dir: Path, history: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draws `training_<key>.png` for losses, accuracies and rewards that the log holds.

    Returns:
        The files written; a curve of fewer than two points is not drawn, and one that cannot be drawn, whatever the
        reason, is a warning: the training that it shows is done. Characters of a key that a file's name cannot
        have everywhere (a reward may be a pattern) become `_`, and names that are the same then get a number.
    """
    keys = dict.fromkeys(key for row in history for key in row if _is_drawn(key))
    written: list[Path] = []
    for key in keys:
        points = [(row["current_steps"], row[key]) for row in history if key in row]
        if len(points) > 1:
            path = _free_path(output_dir, key, written)
            try:
                written.append(_draw(path, key, points))
            except Exception as error:  # a library's own code, fonts, a full disk
                path.unlink(missing_ok=True)
                log.warn(f"{path} cannot be drawn ({type(error).__name__}: {error})")
    return written


def _free_path(folder: Path, key: str, taken: Sequence[Path]) -> Path:
    stem = "training_" + re.sub(r"[^\w.-]+", "_", key)[:100]
    path = folder / f"{stem}.png"
    number = 2
    while path in taken:
        path = folder / f"{stem}_{number}.png"
        number += 1
    return path


def _is_drawn(key: str) -> bool:
    return key in ("loss", "reward") or key.endswith(("_loss", "accuracy")) or key.startswith("rewards/")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the curve, at least three points; starts at the first value."""
    new = 2 / (max(3.0, len(values) / 10) + 1)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else (1 - new) * smoothed[-1] + new * value)
    return smoothed


def _draw(path: Path, key: str, points: Sequence[tuple[int, float]]) -> Path:
    from matplotlib.figure import Figure

    steps, values = [point[0] for point in points], [point[1] for point in points]
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#9db7d5", linewidth=1.2, label="logged")
    axes.plot(steps, smooth(values), color="#1f4e8c", linewidth=2, label="smoothed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(key, parse_math=False)  # a pattern may hold $ twice
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path
