"""Serve a score function over HTTP, for `reward.url`: scoring in another environment, or on another machine.

    python launch/serve_scores.py engine.scores:final_number --port 8765

Answers as `engine.rollout.score_service` asks: {"prompts", "responses", "columns"} -> {"scores"}. A function that fails
is status 500 with what it said. It listens on this machine alone unless told otherwise: there are no passwords.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import engine.startup  # noqa: F401 - first
from engine.config import run
from engine.rollout.score_functions import load_score_function, scores_of_function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("function", help="module:function")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    args = parser.parse_args()
    server = ThreadingHTTPServer((args.host, args.port), handler_of(load_score_function(args.function)))
    print(f"{args.function} on http://{server.server_address[0]}:{server.server_address[1]}", flush=True)
    server.serve_forever()


def handler_of(function) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                asked = json.loads(sent)
                given = (asked["prompts"], asked["responses"], asked["columns"])
                status, answer = 200, {"scores": scores_of_function(function, *given, timeout_s=None).tolist()}
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                status, answer = 400, {"error": f"no such request is known: {error!r}"}
            except ValueError as error:
                status, answer = 500, {"error": str(error)}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


if __name__ == "__main__":
    run(main)
