"""A reward service that a config reaches with `reward_model_type: api`: texts come in, a number for each goes out.

`python examples/rewards/service.py [PORT]` listens on this machine only, port 8009 unless told. Put your own model
where `score` is.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(text):
    """Texts with few different words earn little; `text` is the prompt and its answer."""
    words = text.split()
    return len(set(words)) / max(len(words), 1)


class Scores(BaseHTTPRequestHandler):
    """POST {"model": ..., "messages": [text, ...]} -> {"scores": [number, ...]}."""

    def do_POST(self):
        """Answers one batch."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [score(text) for text in request["messages"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Says nothing for each request."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8009
    server = ThreadingHTTPServer(("127.0.0.1", port), Scores)
    print(f"listening on http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
