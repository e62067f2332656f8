"""ppo_metrics.py by hand arithmetic. One rank: what several ranks add up to is checked with real ranks elsewhere."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
import torch.distributed as dist

from engine.data.sequences import Sequences
from engine.models.loading import load_tokenizer
from engine.rollout.experience import PER_TOKEN, Experience
from engine.trainers.ppo_metrics import (
    StepStatistics,
    experience_metrics,
    explained_variance,
    sample_rows,
    step_metrics,
    token_texts,
    token_view,
)

EOS = 1


def experience(responses, scores, **tensors) -> Experience:
    sequences = Sequences.of([[5, EOS]] * len(responses), responses)  # prompts that end like a response
    flat = {name: torch.zeros(sequences.num_response_tokens) for name in PER_TOKEN}
    flat |= {name: torch.tensor(values) for name, values in tensors.items()}
    return Experience(
        sequences=sequences,
        scores=torch.tensor(scores),
        **flat,
        kl_coef=0.25,
        left_out=torch.zeros(len(scores), dtype=torch.bool),
    )


def test_what_was_rolled_out():
    seen = experience_metrics(
        experience(
            [[7, EOS], [7, 7, 9], [], [8]],  # ended, cut off, empty (after a prompt that ends in EOS), another end
            [1.0, 2.0, 3.0, 6.0],
            kl=[0.1, 0.3, -0.2, 0.4, 0.6, 0.8],
            entropy=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            values=[0.0, 1.0, 1.0, 0.0, 1.0, 0.0],
            returns=[1.0, 2.0, 3.0, 4.0, 5.0, 9.0],
        ),
        eos_token_ids=[EOS, 8],
    )
    # returns - values = 1, 1, 2, 4, 4, 9: mean 3.5, variance (6.25 + 6.25 + 2.25 + 0.25 + 0.25 + 30.25) / 6 = 45.5 / 6
    # returns: mean 4, variance (9 + 4 + 1 + 0 + 1 + 25) / 6 = 40 / 6
    assert seen == pytest.approx(
        {
            "score/mean": 3.0,
            "score/std": math.sqrt((4 + 1 + 0 + 9) / 4),
            "reward/kl_penalty": -0.25 * 2.0 / 4,
            "kl/ref_mean": 2.0 / 4,  # summed over tokens, averaged over the four responses, the empty one included
            "kl/coef": 0.25,
            "policy/entropy": 3.5,
            "value/explained_variance": 1 - 45.5 / 40,
            "response/length_mean": 6 / 4,
            "response/eos_fraction": 2 / 4,
        },
        abs=1e-6,
    )


def test_what_nobody_scored_is_in_no_mean():
    both = experience([[7, EOS], [], [7, 7, 9]], [1.0, 0.0, 2.0], kl=[0.5, 0.5, 1.0, 1.0, 1.0])
    left_out = replace(both, left_out=torch.tensor([False, True, False]))
    alone = experience([[7, EOS], [7, 7, 9]], [1.0, 2.0], kl=[0.5, 0.5, 1.0, 1.0, 1.0])
    assert experience_metrics(left_out, eos_token_ids=[EOS]) == experience_metrics(alone, eos_token_ids=[EOS])
    assert experience_metrics(alone, eos_token_ids=[EOS])["kl/ref_mean"] == 2.0


def test_a_row_to_look_at_for_each_text():
    rows = replace(
        experience([[7, EOS], [], [8]], [1.0, 0.0, 6.0], kl=[0.1, 0.3, 0.5]),
        left_out=torch.tensor([False, True, False]),  # a score of 0 would look like one
    )
    given = (rows, ["p", "q", "r"], [[7, EOS], [9, 9], [8]], ["a", "b"])
    first, second = sample_rows(*given, None)
    assert first == {"prompt": "p", "response": "a", "score": 1.0, "kl": pytest.approx(0.4), "length": 2}
    assert second == {"prompt": "q", "response": "b", "score": None, "kl": 0.0, "length": 2}
    turns = [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}]]
    assert [row["conversation"] for row in sample_rows(*given, turns)] == turns


def test_all_responses_empty_are_finite_numbers():
    seen = experience_metrics(experience([[], []], [1.0, 1.0]), eos_token_ids=[EOS])
    assert all(math.isfinite(value) for value in seen.values())
    assert (seen["response/length_mean"], seen["response/eos_fraction"], seen["policy/entropy"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "returns", "wanted"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 1.0),  # perfect
        ([2.0, 3.0, 5.0], [1.0, 2.0, 4.0], 1.0),  # perfect but for a constant
        ([3.0, 3.0, 3.0], [1.0, 2.0, 4.0], 0.0),  # constant
        ([4.0, 2.0, 1.0], [2.0, 2.0, 2.0], 0.0),  # nothing to explain
        ([-1.0, 1.0], [1.0, -1.0], -3.0),  # worse than a constant: Var(2, -2) / Var(1, -1) = 4
        ([], [], 0.0),
        ([1.0], [5.0], 0.0),
    ],
)
def test_explained_variance(values, returns, wanted):
    assert explained_variance(torch.tensor(values), torch.tensor(returns)) == pytest.approx(wanted)


# Steps


def test_steps_are_weighted_by_their_tokens_and_extremes_are_not_averaged():
    rows = [(10, 1.0, 0.5, 2.0, 3.0, 1.05), (30, 3.0, 0.1, 4.0, 0.7, 2.0), (60, -1.0, 0.0, 1.0, 0.2, 1.2)]
    names = ("tokens", "loss/policy", "policy/clip_fraction", "grad_norm/actor", "policy/log_ratio_max")
    others = dict.fromkeys(
        ("loss/value", "loss/pretraining", "policy/approx_kl", "value/clip_fraction", "grad_norm/critic"), 7.0
    )
    steps = [others | dict(zip((*names, "policy/ratio_max"), row, strict=True)) for row in rows]
    steps = [
        step | {"lr/actor": rate, "lr/critic": 2 * rate} for step, rate in zip(steps, (3.0, 2.0, 1.0), strict=True)
    ]
    assert step_metrics(steps, left_out=()) == pytest.approx(
        others
        | {
            "loss/policy": (10 + 90 - 60) / 100,
            "policy/clip_fraction": (5 + 3) / 100,
            "grad_norm/actor": (20 + 120 + 60) / 100,
            "policy/ratio_max": 2.0,
            "policy/first_log_ratio_max": 3.0,
            "lr/actor": 1.0,
            "lr/critic": 2.0,
        }
    )


def test_the_largest_ratio_is_not_that_of_the_largest_distance():
    """Log-ratios -3 and 0.05: the ratio has fallen far for one token and risen little for the other."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    step = StepStatistics(2, clip_range=0.2, value_clip_range=0.2)
    new, old = torch.tensor([-4.0, -0.95]), torch.tensor([-1.0, -1.0])
    step.add_policy(torch.tensor(0.0), new, old, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    seen = step.over_ranks()
    assert seen["policy/ratio_max"] == pytest.approx(math.exp(0.05))
    assert seen["policy/log_ratio_max"] == pytest.approx(3.0)


def test_without_steps_every_name_is_there_and_not_a_number():
    """Every step of the iteration was skipped: nothing is known, and readers find the columns they expect."""
    seen = step_metrics([], left_out=())
    assert {"loss/policy", "loss/value", "policy/ratio_max", "grad_norm/critic"} <= seen.keys()
    assert all(math.isnan(value) for value in seen.values())


# Token by token


@pytest.fixture(scope="module")
def bytes_of():
    """A tokenizer with a token per byte."""
    return load_tokenizer(tiny.LLAMA)


@pytest.mark.parametrize("text", ["plain words", "ä ∑ 🙂 end", "🙂", " two  spaces "])
def test_the_texts_of_tokens_are_the_text(bytes_of, text):
    tokens = [*bytes_of(text, add_special_tokens=False)["input_ids"], bytes_of.eos_token_id]
    texts = token_texts(tokens, bytes_of)
    assert len(texts) == len(tokens) > len(text) and "".join(texts) == text
    assert texts[-1] == "", "a token that is no text"
    assert all(len(part) <= 1 for part in texts)


def test_a_character_that_breaks_off_is_in_the_text_as_it_is_read(bytes_of):
    tokens = bytes_of("a🙂", add_special_tokens=False)["input_ids"][:3]
    assert "".join(token_texts(tokens, bytes_of)) == bytes_of.decode(tokens)


def test_a_view_of_the_first_response_that_has_tokens(bytes_of):
    word = bytes_of("hey", add_special_tokens=False)["input_ids"]
    seen = experience(
        [[], word, [7]],
        [0.0, 0.5, 9.0],
        **{name: [1.25, math.nan, -0.5, 9.0] for name in ("kl", "logprobs")},
        rewards=[0.0, 0.123456, 0.5, 9.0],
    )
    view = token_view(replace(seen, values=None, returns=None), bytes_of)
    assert view["prompt"] == bytes_of.decode([5, EOS]) and view["score"] == 0.5
    assert view["tokens"] == ["h", "e", "y"] and view["values"] is None
    assert view["kl"] == view["logprobs"] == [1.25, None, -0.5] and view["rewards"] == [0.0, 0.12346, 0.5]
    assert view["advantages"] == view["ref_logprobs"] == [0.0] * 3
    assert token_view(experience([[], []], [1.0, 2.0]), bytes_of) is None
