"""Rewards over HTTP: the protocol, retries, and an end that says what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llamafactory.train.rewards.answer import Answer
from llamafactory.train.rewards.functions import RewardUnavailableError
from llamafactory.train.rewards.service import service_score

ANSWERS = [
    Answer(prompt="p", completion=text, answer=None, prompt_ids=[1], completion_ids=[2], is_stopped=True, row=0)
    for text in ("a", "bcd")
]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    servers: list[ThreadingHTTPServer] = []

    def start(*replies: tuple[int, Any]) -> tuple[str, list[Any]]:
        seen: list[Any] = []
        left = list(replies)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, document = left.pop(0) if len(left) > 1 else left[0]
                body = json.dumps(document).encode() if not isinstance(document, bytes) else document
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_texts_go_out_and_scores_come_back(serve: Callable[..., Any]) -> None:
    url, seen = serve((200, {"scores": [0.5, -1]}))
    assert service_score(url, timeout=5, retries=0)(ANSWERS) == [0.5, -1.0]
    assert seen == [{"model": "model", "messages": ["pa", "pbcd"]}]


@pytest.mark.parametrize("fault", [(500, {}), (200, b"not json"), (200, {"scores": [1]}), (200, {"wrong": []})])
def test_faults_are_tried_again(serve: Callable[..., Any], fault: tuple[int, Any]) -> None:
    url, seen = serve(fault, fault, (200, {"scores": [1, 2]}))
    assert service_score(url, timeout=5, retries=2, first_wait=0.01)(ANSWERS) == [1.0, 2.0]
    assert len(seen) == 3


def test_a_service_that_stays_away_ends_the_run_with_advice(serve: Callable[..., Any]) -> None:
    url, seen = serve((503, {}))
    with pytest.raises(RewardUnavailableError, match=r"in 2 tries.*503") as caught:
        service_score(url, timeout=5, retries=1, first_wait=0.01)(ANSWERS)
    assert "run the same command" in str(caught.value)
    assert len(seen) == 2


def test_nobody_there(serve: Callable[..., Any]) -> None:
    with pytest.raises(RewardUnavailableError, match="gave no scores"):
        service_score("http://127.0.0.1:9/", timeout=1, retries=0)(ANSWERS)
