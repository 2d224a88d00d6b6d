"""The commit of the checkout that this package is run from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """The commit, or None where the package is installed elsewhere (code around it is not its checkout)."""
    folder = Path(__file__).resolve().parents[1]
    if not any((parent / ".git").exists() for parent in folder.parents[:3]):
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
