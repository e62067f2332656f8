"""scoring.py: what a user's score function is given and what it may give back."""

import asyncio
import math
import sys
import threading
import time

import pytest
import tiny
import torch
import torch.distributed as dist

from engine.data import PromptBatch
from engine.data.exchanges import rows_of
from engine.data.sequences import Sequences
from engine.models.random_init import byte_tokenizer
from engine.rollout import scoring
from engine.rollout.reward_text import sequences_for_another_tokenizer
from engine.rollout.score_functions import load_score_function, scores_of_function, scores_one_by_one
from engine.rollout.scoring import Scoring

PROMPTS, RESPONSES = ["p", "q"], ["a", "bcd"]


def scores(function, **columns):
    return scores_of_function(function, PROMPTS, RESPONSES, columns)


def test_scores_are_fp32_in_the_order_of_responses():
    got = scores(lambda prompts, responses: [len(response) for response in responses])
    assert torch.equal(got, torch.tensor([1.0, 3.0])) and got.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.tensor([0.5, -1.0]), (0.5, -1.0), iter([0.5, -1.0])])
def test_tensors_and_other_iterables_of_numbers_will_do(value):
    assert scores(lambda **given: value).tolist() == [0.5, -1.0]


def test_text_and_columns_are_passed():
    seen = {}

    def function(**given):
        seen.update(given)
        return [0, 0]

    scores(function, answer=["1", "2"], level=[3, 4])
    assert seen == dict(prompts=PROMPTS, responses=RESPONSES, answer=["1", "2"], level=[3, 4])


def test_columns_called_like_the_text_give_way_to_it():
    def function(prompts, responses, answer):
        assert (prompts, responses, answer) == (PROMPTS, RESPONSES, [1, 2])
        return [0, 0]

    assert scores(function, prompts=["x", "y"], responses=["x", "y"], answer=[1, 2]).tolist() == [0, 0]


def test_no_rows_call_nothing():
    def function(**given):
        raise AssertionError("called without rows")

    assert scores_of_function(function, [], [], {"answer": []}).shape == (0,)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_wrong_number_of_scores_is_refused_with_both_numbers(number):
    with pytest.raises(ValueError, match=f"returned {number} scores for 2 responses"):
        scores(lambda **given: [0.0] * number)


def test_what_it_raises_is_shown_with_its_name():
    def picky(prompts, responses):
        raise KeyError("no such answer")

    with pytest.raises(ValueError, match=r"picky raised KeyError: .*no such answer") as error:
        scores(picky)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_missing_argument_is_shown_with_its_name():
    def wants_more(prompts, responses, answer):
        return [0, 0]

    with pytest.raises(ValueError, match=r"wants_more is called with .*missing a required argument: 'answer'"):
        scores(wants_more)


@pytest.mark.parametrize("value", [None, 7, ["a", "b"], [None, 1.0], [[1.0], [2.0]], [1.0, {}]])
def test_what_is_not_a_list_of_numbers_is_refused(value):
    def odd(**given):
        return value

    with pytest.raises(ValueError, match=r"odd returned something that is not a list of numbers"):
        scores(odd)


def test_nan_is_let_through():
    assert [math.isnan(score) for score in scores(lambda **given: [float("nan"), 1.0]).tolist()] == [True, False]


# Finding it


def test_the_named_function_is_found():
    assert load_score_function("math:sqrt") is math.sqrt


def test_an_unknown_module_is_named_with_what_to_do():
    with pytest.raises(ValueError, match=r"reward\.function=no_such_module:f: importing no_such_module .*PYTHONPATH"):
        load_score_function("no_such_module:f")


@pytest.mark.parametrize("name", ["square_root", "pi"])
def test_an_unknown_function_or_one_that_cannot_be_called_is_named(name):
    with pytest.raises(ValueError, match=f"math has no function {name}"):
        load_score_function(f"math:{name}")


def test_a_callable_object_is_a_score_function(tmp_path, monkeypatch):
    (tmp_path / "scorer_of_tests.py").write_text(
        "from functools import partial\n"
        "class Longest:\n"
        "    def __call__(self, prompts, responses):\n"
        "        return [len(response) for response in responses]\n"
        "longest = Longest()\n"
        "def _scaled(scale, prompts, responses):\n"
        "    return [scale * len(response) for response in responses]\n"
        "twice = partial(_scaled, 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scores(load_score_function("scorer_of_tests:longest")).tolist() == [1, 3]
    assert scores(load_score_function("scorer_of_tests:twice")).tolist() == [2, 6]


def test_a_function_that_does_not_take_the_columns_is_told_how_to(tmp_path):
    def narrow(prompts, responses, answer):
        return [0.0, 0.0]

    with pytest.raises(ValueError, match=r"narrow is called with .*\(answer, level\).*'level'.*go into \*\*columns"):
        scores(narrow, answer=["1", "2"], level=[3, 4])


def test_an_error_names_the_line_of_the_users_function():
    def fails(prompts, responses):
        return len(responses) / 0

    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"fails raised ZeroDivisionError: .* \(.*test_scoring\.py, line {line}\)"):
        scores(fails)


def test_a_module_in_the_folder_of_the_run_is_found(tmp_path, monkeypatch):
    (tmp_path / "scores_of_my_own.py").write_text("def one(**given): return [1.0]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())
    assert load_score_function("scores_of_my_own:one")() == [1.0]


# In another tokenizer's words

EOS = "<eos>"


def read(exchanges, tokenizer) -> list[tuple[str, str]]:
    """What the reward model reads, written out again."""
    rows = rows_of(sequences_for_another_tokenizer(exchanges, tokenizer))
    return [(tokenizer.decode(prompt), tokenizer.decode(response)) for prompt, response in rows]


def test_text_is_taken_as_the_actor_saw_it():
    """A prompt cut to its end, say; a response that ended is ended, one that was cut off is not."""
    exchanges = [("the prompt", "prompt", " so", True), ("p", "p", " so", False), ("p", "p", "", True)]
    assert read(exchanges, byte_tokenizer()) == [("prompt", f" so{EOS}"), ("p", " so"), ("p", EOS)]
    assert read([("p", "p", "", False)], byte_tokenizer()) == [("p", "")]


def test_a_conversation_goes_through_the_reward_models_own_template():
    conversation = [{"role": "user", "content": "hi"}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    exchanges = [(conversation, "user: hi\nassistant: ", "yes", ended) for ended in (True, False)]
    before = f"[user]hi{EOS}[assistant]"
    assert read(exchanges, tokenizer) == [(before, f"yes{EOS}"), (before, "yes")]


def test_a_response_that_was_cut_off_has_no_end_of_turn_either():
    """A template whose turns end with something else than EOS, as those of base models' tokenizers do."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (_, response), *_ = read([([{"role": "user", "content": "hi"}], "x", "yes, it i", False)], tokenizer)
    assert response == "yes, it i"


@pytest.mark.parametrize("response", ["t", "d", "", "end", "yes "])
def test_a_cut_off_response_that_the_template_contains_is_not_cut_again(response):
    """Its letters stand in what the template writes before it and after it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}<think>{% endif %}"
        "{{ m['content'] }}[/end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (_, read_as), *_ = read([([{"role": "user", "content": "hi"}], "x", response, False)], tokenizer)
    assert read_as == f"<think>{response}"


def test_no_exchanges_are_no_sequences():
    assert len(sequences_for_another_tokenizer([], byte_tokenizer())) == 0


# Async functions, time limits, and functions that fail for some


async def later(prompts, responses):
    await asyncio.sleep(0.01)
    return [len(response) for response in responses]


def test_an_async_function_is_waited_for():
    assert scores(later).tolist() == [1, 3]


def slow(prompts, responses):
    time.sleep(5)
    return [0.0, 0.0]


async def slow_async(prompts, responses):
    await asyncio.sleep(5)


@pytest.mark.parametrize("function", [slow, slow_async])
def test_a_function_may_take_so_long_and_no_longer(function):
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"{function.__name__} took longer than reward\.timeout_s=0\.2"):
        scores_of_function(function, PROMPTS, RESPONSES, {}, timeout_s=0.2)
    assert time.monotonic() - started < 3
    waiting = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert waiting and all(thread.daemon for thread in waiting), "what it left behind keeps no process from ending"
    assert scores_of_function(later, PROMPTS, RESPONSES, {}, timeout_s=3).tolist() == [1, 3]


def test_what_it_raises_within_the_time_is_what_is_shown():
    def fails(prompts, responses):
        raise KeyError("no such answer")

    with pytest.raises(ValueError, match=r"fails raised KeyError: .*no such answer"):
        scores_of_function(fails, PROMPTS, RESPONSES, {}, timeout_s=5)


def picky(prompts, responses, answer):
    if "q" in prompts:
        raise KeyError("no q")
    return [float(number) for number in answer]


def test_only_the_response_that_a_function_cannot_judge_is_left_out():
    got, errors = scores_one_by_one(picky, ["p", "q", "r"], ["", "", ""], {"answer": [5, 6, 7]})
    assert got[0] == 5 and got[1].isnan() and got[2] == 7
    assert errors[0] is errors[2] is None and "picky raised KeyError: 'no q'" in errors[1]


def test_a_function_that_takes_too_long_judges_none():
    calls = []

    def slow_once_more(prompts, responses):
        calls.append(prompts)
        time.sleep(5)

    got, errors = scores_one_by_one(slow_once_more, PROMPTS, RESPONSES, {}, timeout_s=0.2)
    assert got.isnan().all() and all("took longer" in error for error in errors)
    assert calls == [PROMPTS], "row by row it would take longer still"


# Sources together, on one rank: several are in e2e/test_scores_from_anywhere.py


def not_of_b(prompts, responses):
    if "b" in responses:
        raise KeyError("b")
    return [float(len(response)) for response in responses]


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def of_a_service(*failing):
    """Scores of 10; or a service that is down."""

    def scores(url, prompts, responses, columns, **settings):
        if failing:
            raise ValueError("down")
        return torch.full((len(responses),), 10.0)

    return scores


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """`scored(service)` -> Scored, of two responses to each of two prompts; a function cannot judge the second."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokenizer = byte_tokenizer()
    texts = ["aaa", "b", "c", "dd"]

    def score(service, on_error="mask"):
        monkeypatch.setattr(scoring, "scores_of_service", service)
        given = dict(reward__function="test_scoring:not_of_b", reward__url="http://there", reward__on_error=on_error)
        weights = dict(reward__function_weight=2.0, reward__url_weight=0.5, rollout__samples_per_prompt=2)
        config = tiny.ppo_config(tmp_path, **given, **weights)
        monkeypatch.setattr(scoring, "load_score_function", lambda spec: not_of_b if on_error == "mask" else length)
        sources = Scoring(config, reward=None, tokenizer=tokenizer, reward_tokenizer=None, eos_token_ids=[1])
        responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        prompts = PromptBatch(prompts=["p"] * 4, tokens=[[5]] * 4, texts=["p"] * 4, ids=[0, 0, 1, 1], columns={})
        return sources.scores(prompts, responses, Sequences.of([[5]] * 4, responses))

    return score


def test_what_one_source_cannot_judge_is_unscored_whatever_the_next_says(scored, capsys):
    """2 x length + 10 / 2."""
    scores, failed = scored(of_a_service())
    assert failed.tolist() == [False, True, False, False]
    assert scores.tolist() == [11, 0, 7, 9]
    assert (
        "1 of 4 responses are left out, unscored: the score function not_of_b raised KeyError"
        in capsys.readouterr().out
    )


def test_a_source_that_judges_none_stops_the_run_beside_one_that_does(scored):
    with pytest.raises(ValueError, match=r"^not one of 4 responses was scored: down$"):
        scored(of_a_service("down"))
    with pytest.raises(ValueError, match=r"^down$"):
        scored(of_a_service("down"), on_error="stop")
    assert scored(of_a_service(), on_error="stop").scores.tolist() == [11, 7, 7, 9]
