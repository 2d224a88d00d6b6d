"""Hubs at their boundary: a Hugging Face hub over HTTP on this machine, and the two others' download functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from llamafactory.data.sources import hub, read_source
from llamafactory.data.types import DatasetSpec, SourceAccess
from llamafactory.extras.errors import DataError

COMMIT = "1" * 40
FILES = {
    "dataset_info.json": json.dumps({"remote": {"hf_hub_url": "user/data"}}).encode(),
    "train.jsonl": b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as `load_dataset` and `hf_hub_download` ask for."""

    tokens: ClassVar[set[tuple[str, str]]] = set()

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send(200, json.dumps([self.entry(name) for name in FILES]).encode())

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/datasets/user/data/resolve/") and name in FILES:
            Hub.tokens.add((name, self.headers.get("Authorization", "")))
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            self.send(200, FILES[name], headers, with_body=with_body)
        elif path.startswith("/api/datasets/user/data/tree/"):
            self.send(200, json.dumps([self.entry(name) for name in FILES]).encode())
        elif path in ("/api/datasets/user/data", f"/api/datasets/user/data/revision/{COMMIT}") or path.startswith(
            "/api/datasets/user/data/revision/"
        ):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "user/data", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.send(200, json.dumps(info | {"downloads": 0, "likes": 0, "gated": False}).encode())
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    @staticmethod
    def entry(name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": name}

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from llamafactory.data.registry import find_spec
from llamafactory.data.sources import read_source
from llamafactory.data.types import SourceAccess
access = SourceAccess(cache_dir=sys.argv[1], hf_token="hf_secret", is_streaming=sys.argv[2] == "stream")
spec = find_spec("remote", "REMOTE:user/data", access)
print(json.dumps([[row.origin, dict(row.values)] for row in read_source(spec)]))
"""


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_registry_and_rows_come_over_http_with_token_and_cache(endpoint: str, tmp_path: Path, way: str) -> None:
    Hub.tokens.clear()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", READ, str(tmp_path / "cache"), way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in FILES["train.jsonl"].decode().splitlines()]
    assert json.loads(done.stdout) == [["remote#1", rows[0]], ["remote#2", rows[1]]]
    assert {(name, "Bearer hf_secret") for name in FILES} <= Hub.tokens
    assert list((tmp_path / "cache").rglob("dataset_info.json"))


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, function: str, folder: Path) -> list[Any]:
    """A package whose function `function` gives the folder; what it is asked comes back."""
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    for place in range(len(name.split("."))):
        part = ".".join(name.split(".")[: place + 1])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[name], function, download)
    monkeypatch.setattr(hub, "is_installed", lambda module: True)
    return asked


@pytest.mark.parametrize(
    ("source", "package", "function", "options"),
    [
        ("modelscope", "modelscope.hub.snapshot_download", "dataset_snapshot_download", {"token": "ms"}),
        ("openmind", "openmind_hub", "snapshot_download", {"token": "om", "repo_type": "dataset"}),
    ],
)
def test_other_hubs_give_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Any, package: str, function: str, options: dict[str, str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(FILES["train.jsonl"])
    (folder / "test.jsonl").write_bytes(FILES["train.jsonl"].splitlines()[0])
    asked = fake_package(monkeypatch, package, function, folder)
    access = SourceAccess(cache_dir=str(tmp_path / "cache"), ms_token="ms", om_token="om")
    spec = DatasetSpec(name="x", source=source, location="user/data", split="test", access=access)
    assert [dict(row.values) for row in read_source(spec)] == [{"instruction": "a", "output": "b"}]
    assert asked == [("user/data", {"cache_dir": str(tmp_path / "cache"), **options})]


@pytest.mark.parametrize(
    ("source", "found"), [("modelscope", "ModelScope"), ("openmind", "OpenMind"), ("hub", "the hub")]
)
def test_a_hub_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, source: Any, found: str) -> None:
    def fail(spec: DatasetSpec) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(hub, "_load", fail)
    monkeypatch.setattr(hub, "is_installed", lambda module: True)
    with pytest.raises(DataError, match=rf"cannot be loaded from {found}(?s:.*)ConnectionError: no network\n"):
        list(read_source(DatasetSpec(name="x", source=source, location="user/data")))
