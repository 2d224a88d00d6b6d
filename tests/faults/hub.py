"""A hub on this machine: what the clients of huggingface.co ask, answered from folders, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAILURES: dict[str, tuple[int, dict[str, str]]] = {
    "500": (500, {}),
    "503": (503, {}),
    "401": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "403": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}),
    "404": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
}
"""Way to fail -> status and headers, as huggingface.co gives them."""


@dataclass(frozen=True)
class Asked:
    """One request: when (monotonic seconds), and what."""

    at: float
    method: str
    path: str


class Hub:
    """Repositories from folders. `state` is `ok`, `hang`, or one of `FAILURES`; it may change at any time.

    `commits` ends with the one that the main branches are at. Only the content of now is served, for all of them.
    """

    def __init__(self, owners: Mapping[str, Mapping[str, Path]]) -> None:
        """Starts.

        Args:
            owners: kind of repository (`models` or `datasets`) -> name of its owner -> folder. Every repository of an
                owner has the content of that folder, so that each test can ask for one that nobody has cached.
        """
        self.owners = owners
        self.state, self.only = "ok", ""
        self.commits = [COMMIT]
        self.asked: list[Asked] = []
        self._released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._handler = Handler
        self._server = self._listen(0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def close(self) -> None:
        """Ends, and so refuses every connection."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, state: str, only: str = "") -> Iterator[None]:
        """Fails in that way, only where the address holds a text; `down` is a port that nobody listens to."""
        if state == "down":
            self._server.shutdown()
            self._server.server_close()
        else:
            self.state, self.only = state, only
        try:
            yield
        finally:
            self.state, self.only = "ok", ""
            if state == "down":
                self._server = self._listen(self._server.server_port)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request, as `state` says."""
        self.asked.append(Asked(time.monotonic(), request.command, request.path))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        is_failing = self.only in request.path
        if is_failing and self.state == "hang":
            self._released.wait()
            request.close_connection = True
            return
        if is_failing and self.state in FAILURES:
            status, headers = FAILURES[self.state]
            send(request, status, b'{"error": "no"}', headers)
            return
        path = unquote(urlsplit(request.path).path)
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        folder = self.owners.get(kind, {}).get(parts[0])
        if folder is None or len(parts) < 2:
            status, headers = FAILURES["404"]
            send(request, status, b"{}", headers)
            return
        name, rest = "/".join(parts[:2]), parts[2:]
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[:1] == ["resolve"]:
            commit = self.commits[-1] if rest[1] == "main" else rest[1]
            send_file(request, files.get("/".join(rest[2:])), commit)
        elif rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [entry(key, file) for key, file in files.items() if key.startswith(below)]
            send_json(request, found) if found else send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif rest[:1] == ["paths-info"]:
            asked = json.loads(body)["paths"]
            send_json(request, [entry(key, files[key]) for key in asked if key in files])
        elif rest[:1] in ([], ["revision"]) and (not rest[1:] or rest[1] in ["main", *self.commits]):
            siblings = [{"rfilename": key} for key in files]
            commit = rest[1] if rest[1:] and rest[1] != "main" else self.commits[-1]
            send_json(request, {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        else:
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})


def entry(name: str, file: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": tag(file)}


def tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def send_file(request: BaseHTTPRequestHandler, file: Path | None, commit: str) -> None:
    headers = {"X-Repo-Commit": commit}
    if file is None:
        send(request, 404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        return
    send(request, 200, file.read_bytes(), {**headers, "ETag": f'"{tag(file)}"', "X-Linked-Etag": f'"{tag(file)}"'})


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    request.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
