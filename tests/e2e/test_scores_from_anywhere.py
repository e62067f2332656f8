"""Scores from anywhere, on two ranks: sums of sources, sources that fail, what becomes of scores before training."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ranks
import tiny
from runs import build, train
from test_laws import furthest

from engine.distributed import comm

AT = "test_scores_from_anywhere:"


def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def fails_for_one_row(prompts, responses, number, **columns):
    """Prompt 3 cannot be judged, alone or among others."""
    if 3 in number:
        raise RuntimeError("no gold answer")
    return length(prompts, responses)


def fails(prompts, responses, **columns):
    raise RuntimeError("out of order")


@pytest.fixture
def service():
    """`service(fail=0)`: the address of a server that gives every response its number of letters, after refusing so
    many requests.
    """
    servers = []

    def start(fail=0):
        left = [fail]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                left[0] -= 1
                self.send_response(503 if left[0] >= 0 else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"scores": [len(text) for text in given["responses"]]}).encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def scored(config):
    """Scores of one iteration, with the lengths of the responses as text; rewards' sums; which rows have tokens."""
    trainer, prompts = build(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    sequences = experience.sequences
    texts = trainer.scoring.texts([part.tolist() for part in sequences.tokens.split(sequences.lengths.tolist())])
    prompts_too = sequences.tokens.split(sequences.lengths.tolist())
    only = [row[n:].tolist() for row, n in zip(prompts_too, sequences.prompt_lengths.tolist(), strict=True)]
    return {
        "scores": experience.scores.tolist(),
        "letters": [len(text) for text in trainer.scoring.texts(only)],
        "rewards": experience.padded("rewards").sum(1).tolist(),
        "lengths": sequences.response_lengths.tolist(),
        "failed": trainer.unscored,
        "texts": texts,
    }


def test_a_service_scores_like_the_function_it_is(run_ranks, ppo_config, service):
    by_function = run_ranks(train, ppo_config(reward__function=AT + "length"))[0]
    by_service = run_ranks(train, ppo_config(reward__function=None, reward__url=service(fail=1)))[0]
    assert by_service["metrics"] == by_function["metrics"], "the first request of a rank was refused and asked again"


def test_sources_add_up_by_their_weights(run_ranks, ppo_config, service):
    model = tiny.score_head(tiny.LLAMA)
    alone = run_ranks(scored, ppo_config(kl_coef=0.0))[0]
    given = dict(reward__function=AT + "length", reward__model_name_or_path=model, kl_coef=0.0)
    weights = dict(reward__model_weight=2.0, reward__function_weight=0.5, reward__url_weight=-0.25)
    together = run_ranks(scored, ppo_config(**given, reward__url=service(), **weights))
    assert together[0] == together[1]
    wanted = [2 * score + 0.25 * n for score, n in zip(alone["scores"], alone["letters"], strict=True)]
    assert together[0]["scores"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", [0, "strict"])
def test_a_response_that_cannot_be_scored_is_left_out_of_training(run_ranks, ppo_config, tmp_path, kind):
    given = dict(reward__function=AT + "fails_for_one_row", reward__on_error="mask", kl_coef=0.0)
    config = ppo_config(**given, **tiny.sharding(kind, tmp_path))
    first, second = run_ranks(scored, config)
    assert first == second and first["failed"] == 1 and len(first["scores"]) == 8
    (row,) = [row for row, length in enumerate(first["lengths"]) if length == 0]
    assert first["texts"][row] == tiny.PROMPTS[3]
    assert first["scores"][row] == 0 and sum(score > 0 for score in first["scores"]) > 3
    runs = [run_ranks(train, ppo_config(**given), world_size=size)[0]["metrics"] for size in (1, 2)]
    assert furthest(*runs) < 1e-5 and {line["score/failed"] for line in runs[0]} == {1}


def said(config):
    trainer, prompts = build(config)
    started = time.monotonic()
    try:
        trainer.generate_experience(next(iter(prompts)))
    except ValueError as error:
        comm.barrier()  # every rank got here
        return str(error), time.monotonic() - started
    return "nothing", 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(reward__function=AT + "fails_for_one_row"), "on rank .* of 2: .*raised RuntimeError: no gold answer"),
        (
            dict(reward__function=AT + "fails", reward__on_error="mask"),
            "not one of 8 responses was scored: .*out of order",
        ),
        (
            dict(reward__function=AT + "fails", reward__on_error="mask", prompts=tiny.PROMPTS[:1]),
            "not one of 1 responses was scored: .*out of order",  # on a rank without prompts too
        ),
        (dict(reward__function=AT + "fails"), "raised RuntimeError: out of order"),
    ],
)
def test_what_stops_a_run_is_the_same_message_on_all_ranks(run_ranks, ppo_config, given, message):
    (first, _), (second, _) = run_ranks(said, ppo_config(**given))
    assert first == second
    with pytest.raises(ValueError, match=message):
        raise ValueError(first)


@pytest.mark.parametrize("on_error", ["stop", "mask"])
def test_a_service_that_is_down_stops_the_run_with_its_name(run_ranks, ppo_config, on_error):
    url = f"http://127.0.0.1:{ranks.free_port()}/"
    given = dict(reward__function=None, reward__url=url, reward__retries=1, reward__on_error=on_error)
    for message, _ in run_ranks(said, ppo_config(**given)):
        assert f"the score service {url} could not be reached" in message and "2 times" in message


def test_clipping_and_penalties_change_the_rewards_and_not_the_scores(run_ranks, ppo_config):
    """A response's rewards add up to its shaped score while there is no KL penalty."""
    given = dict(reward__function=AT + "length", kl_coef=0.0, seed=1)
    shaping = dict(
        reward__clip=5.0, reward__missing_eos_penalty=3.0, reward__overlong_penalty=1.0, reward__overlong_tokens=6
    )
    plain, shaped = (run_ranks(scored, ppo_config(**given, **more))[0] for more in ({}, shaping))
    assert plain["scores"] == shaped["scores"] == pytest.approx(plain["rewards"])
    assert max(plain["scores"]) > 5
    cut_off = [length == 12 for length in shaped["lengths"]]  # the random model hardly ever ends at the last token
    wanted = [
        min(score, 5.0) - 3.0 * cut - min(max((length - 6) / 6, 0), 1)
        for score, cut, length in zip(shaped["scores"], cut_off, shaped["lengths"], strict=True)
    ]
    assert any(cut_off) and shaped["rewards"] == pytest.approx(wanted, abs=1e-5)


def test_running_normalisation_is_that_of_all_scores_so_far(run_ranks, ppo_config):
    config = ppo_config(reward__function=AT + "length", reward__running_normalisation=True, kl_coef=0.0)
    one, two = (run_ranks(scored, config, world_size=size)[0] for size in (1, 2))
    mean = sum(one["scores"]) / 8
    std = (sum((score - mean) ** 2 for score in one["scores"]) / 8) ** 0.5
    assert one["rewards"] == pytest.approx([(score - mean) / std for score in one["scores"]], abs=1e-5)
    assert two == one
