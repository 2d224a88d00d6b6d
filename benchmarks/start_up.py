"""CPU seconds and memory of commands that must answer at once, and of rendering 1,000 lines (`--repeats N`)."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "version": ["version"],
    "help": ["help"],
    "check": ["check", str(ROOT / "examples" / "quickstart.yaml")],
    "python alone": [],
}
LIMITS = {"version": 0.15, "help": 0.15, "check": 0.6, "data render": 3.0}
TURNS = [{"role": role, "content": f"Some words of a {role}. " * 8} for role in ("user", "assistant") * 2]


def measure(words: list[str]) -> tuple[float, float]:
    """CPU seconds (user and system) and peak MiB of one process."""
    program = ["-m", "llamafactory", *words] if words else ["-c", "pass"]
    with subprocess.Popen(
        [sys.executable, *program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as child:
        _, _, usage = os.wait4(child.pid, 0)
        child.returncode = 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> int:
    """Prints a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "thousand.jsonl"
        lines.write_text((json.dumps({"messages": TURNS}) + "\n") * 1000, encoding="utf-8")
        commands = COMMANDS | {"data render": ["data", "render", "--template", "chatml", str(lines)]}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(repeats + 1):  # the first round warms the disk cache; commands take turns
            for name, words in commands.items():
                found[name].append(measure(words))
    print(f"{'command':<14}{'median CPU s':>14}{'min':>8}{'max':>8}{'MiB':>8}{'limit':>8}")
    for name, values in found.items():
        seconds = [cpu for cpu, _ in values[1:]]
        memory = max(mib for _, mib in values[1:])
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        middle = statistics.median(seconds)
        print(f"{name:<14}{middle:>14.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{memory:>8.0f}{limit:>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
