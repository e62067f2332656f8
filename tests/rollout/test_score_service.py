"""score_service.py against real servers on loopback: good ones, slow ones, broken ones, and none at all."""

import json
import math
import subprocess
import sys
import threading
import time
from datetime import date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ranks import free_port

from engine.rollout import score_service
from engine.rollout.score_service import scores_of_service

PROMPTS, RESPONSES, COLUMNS = ["p", "q"], ["a", "bcd"], {"answer": [1, "é"]}
GOOD = (200, {"scores": [1, 3.5]})


@pytest.fixture
def served(monkeypatch):
    """`served(answer, answer, ...)`: a server's address and the requests it gets. An answer is (status, body), a number
    of seconds to think first, or bytes; the last is repeated.
    """
    monkeypatch.setattr(score_service, "FIRST_WAIT_S", 0.01)
    servers = []

    def start(*answers):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = answers[min(len(seen), len(answers)) - 1]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = GOOD
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/scores", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(url, *, timeout_s=5.0, retries=2):
    return scores_of_service(url, PROMPTS, RESPONSES, COLUMNS, timeout_s=timeout_s, retries=retries)


def test_text_and_columns_are_sent_and_scores_come_back(served):
    url, seen = served(GOOD)
    assert asked(url).tolist() == [1.0, 3.5]
    assert seen == [{"prompts": PROMPTS, "responses": RESPONSES, "columns": COLUMNS}]


def test_columns_that_json_has_no_word_for(served):
    url, seen = served(GOOD)
    columns = {
        "when": [datetime(2026, 1, 2, 3, 4), date(2026, 1, 2)],
        "weight": [math.nan, 0.5],
        "of": [{1: (2,)}, None],
    }
    scores_of_service(url, PROMPTS, RESPONSES, columns, timeout_s=5.0, retries=0)
    assert seen[0]["columns"] == {
        "when": ["2026-01-02 03:04:00", "2026-01-02"],
        "weight": [None, 0.5],
        "of": [{"1": [2]}, None],
    }


@pytest.mark.parametrize("trouble", [(503, "busy"), (429, "slow down"), (500, b"oops"), 0.6])
def test_what_may_pass_is_asked_again(served, trouble):
    url, seen = served(trouble, trouble, GOOD)
    assert asked(url, timeout_s=0.3).tolist() == [1.0, 3.5] and len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "said", "attempts"),
    [
        ((503, "busy"), r'answered 503: "busy", 3 times', 3),
        ((404, "nothing here"), "answered 404", 1),
        (1.0, r"took longer than reward\.timeout_s=0\.3, 3 times", 3),
        (b"<html>", r"did not answer .*<html>", 1),
        ((200, [1, 2]), r"did not answer", 1),
        ((200, {"score": [1, 2]}), r"did not answer", 1),
        ((200, {"scores": [1]}), "returned 1 scores for 2 responses", 1),
        ((200, {"scores": [1, "good"]}), "not a list of numbers", 1),
        ((200, {"scores": None}), "not a list of numbers", 1),
    ],
)
def test_what_does_not_pass_is_an_error_that_names_the_service(served, answer, said, attempts):
    url, seen = served(answer)
    with pytest.raises(ValueError, match=f"the score service {url} .*{said}"):
        asked(url, timeout_s=0.3 if isinstance(answer, float) else 5.0)
    assert len(seen) == attempts


def test_a_service_that_is_not_there(monkeypatch):
    monkeypatch.setattr(score_service, "FIRST_WAIT_S", 0.01)
    with pytest.raises(ValueError, match=r"could not be reached .*, 3 times"):
        asked(f"http://127.0.0.1:{free_port()}/scores")


def test_a_service_that_comes_back_is_waited_for(monkeypatch):
    """Down when it is first asked, up a second later, as when it is restarted."""
    monkeypatch.setattr(score_service, "FIRST_WAIT_S", 0.4)
    port, seen = free_port(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [1, 3.5]}).encode())

        def log_message(self, *args):
            pass

    servers = []

    def start_later():
        time.sleep(1.0)
        servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        servers[0].serve_forever()

    threading.Thread(target=start_later, daemon=True).start()
    assert asked(f"http://127.0.0.1:{port}/scores", retries=5).tolist() == [1.0, 3.5] and len(seen) == 1
    servers[0].shutdown()
    servers[0].server_close()


def test_each_wait_is_twice_the_last(monkeypatch, served):
    waits = []
    monkeypatch.setattr(score_service.time, "sleep", waits.append)
    with pytest.raises(ValueError, match="5 times"):
        asked(f"http://127.0.0.1:{free_port()}/scores", retries=4)
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_the_server_that_is_shipped_answers_with_what_a_function_says():
    """launch/serve_scores.py as its own process: right scores, and a failing function's words."""
    script = Path(__file__).parents[2] / "launch" / "serve_scores.py"
    command = [sys.executable, str(script), "engine.scores:final_number", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = server.stdout.readline().split(" on ")[1].strip()
            given = dict(timeout_s=10.0, retries=0)
            scores = scores_of_service(url, ["p", "q"], ["it is 1,000", "2"], {"answer": ["#### 1000", "3"]}, **given)
            assert scores.tolist() == [1.0, 0.0]
            with pytest.raises(ValueError, match=r"answered 500.*do not fit its arguments"):
                scores_of_service(url, ["p"], ["1"], {"other": ["1"]}, **given)
        finally:
            server.terminate()
