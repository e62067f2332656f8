"""ppo_metrics.py by hand arithmetic. One rank: what several ranks add up to is checked with real ranks elsewhere."""

import math

import pytest
import torch
import torch.distributed as dist

from engine.rollout.experience import PER_TOKEN, Experience
from engine.rollout.sequences import Sequences
from engine.trainers.ppo_metrics import StepStatistics, experience_metrics, explained_variance, step_metrics

EOS = 1


def experience(responses, scores, **tensors) -> Experience:
    sequences = Sequences.of([[5, EOS]] * len(responses), responses)  # prompts that end like a response
    flat = {name: torch.zeros(sequences.num_response_tokens) for name in PER_TOKEN}
    flat |= {name: torch.tensor(values) for name, values in tensors.items()}
    return Experience(sequences=sequences, scores=torch.tensor(scores), **flat, kl_coef=0.25)


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
    names = ("tokens", "loss/policy", "policy/clip_fraction", "grad_norm/actor", "policy/log_ratio_max")
    rows = [(10, 1.0, 0.5, 2.0, 0.1), (30, 3.0, 0.1, 4.0, 0.7), (60, -1.0, 0.0, 1.0, 0.2)]
    steps = [dict(zip(names, row, strict=True)) for row in rows]
    assert step_metrics(steps) == pytest.approx(
        {
            "loss/policy": (10 + 90 - 60) / 100,
            "policy/clip_fraction": (5 + 3) / 100,
            "grad_norm/actor": (20 + 120 + 60) / 100,
            "policy/ratio_max": math.exp(0.7),
            "policy/first_log_ratio_max": 0.1,
        }
    )


def test_no_steps_no_metrics():
    """Every step of the iteration was skipped: nothing is reported rather than zeros."""
    assert step_metrics([]) == {}


def test_a_ratio_too_large_for_a_float_is_infinite_and_no_error():
    step = {"tokens": 1, "policy/log_ratio_max": 1e4}
    assert step_metrics([step])["policy/ratio_max"] == math.inf


@pytest.fixture
def one_rank():
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(count=5) -> StepStatistics:
    return StepStatistics(count, clip_range=0.2, value_clip_range=0.5)


def test_a_step_adds_up_its_micro_batches(one_rank):
    """Two micro-batches, 3 + 2 of 5 tokens.

    Ratio 1.5 with A > 0 and 0.5 with A < 0 are clipped; 1.1 is inside; 2 with A < 0 and 1 are not.
    """
    statistics = step()
    given = [
        (torch.tensor([1.5, 1.1, 0.5]), torch.tensor([1.0, 1.0, -1.0]), 0.25),
        (torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), 0.5),
    ]
    for ratios, advantages, loss in given:
        old, ones = torch.full_like(ratios, -2.0), torch.ones_like(ratios)
        statistics.add_policy(torch.tensor(loss), old + ratios.log(), old, advantages, ones.bool())
        # From 0 to 1 where the return is 2: clipped at 0.5, which is further from it, in three of five tokens.
        returns = torch.tensor([2.0, 2.0, 0.0]) if len(ratios) == 3 else torch.tensor([2.0, 0.0])
        statistics.add_value(torch.tensor(1.5), ones, 0 * ones, returns, ones.bool())
    wanted_kl = sum(r - 1 - math.log(r) for r in (1.5, 1.1, 0.5, 2.0, 1.0))
    assert statistics.losses_are_finite
    assert statistics.over_ranks() == pytest.approx(
        {
            "tokens": 5,
            "loss/policy": 0.75,
            "loss/value": 3.0,
            "policy/clip_fraction": 2 / 5,
            "policy/approx_kl": wanted_kl / 5,
            "policy/log_ratio_max": math.log(2.0),  # |log 0.5| and log 2 alike
            "value/clip_fraction": 3 / 5,
        },
        rel=1e-5,
    )


def test_the_largest_log_ratio_is_of_either_sign(one_rank):
    statistics = step()
    mask = torch.tensor([True, True, False])
    statistics.add_policy(torch.tensor(0.0), torch.tensor([-3.0, 0.5, 90.0]), torch.zeros(3), torch.ones(3), mask)
    assert statistics.over_ranks()["policy/log_ratio_max"] == pytest.approx(3.0)


def test_an_empty_micro_batch_adds_nothing(one_rank):
    statistics, nothing = step(), torch.empty(0)
    none = torch.empty(0, dtype=torch.bool)
    statistics.add_policy(torch.tensor(0.0), nothing, nothing, nothing, none)
    statistics.add_value(torch.tensor(0.0), nothing, nothing, nothing, none)
    seen = statistics.over_ranks()
    assert seen.pop("tokens") == 5
    assert set(seen.values()) == {0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["policy", "value"])
def test_a_loss_that_is_not_finite_is_noticed_also_when_others_follow(which, bad):
    statistics, one, mask = step(), torch.zeros(1), torch.ones(1, dtype=torch.bool)
    for loss in (bad, 1.0):
        (statistics.add_policy if which == "policy" else statistics.add_value)(torch.tensor(loss), one, one, one, mask)
    assert not statistics.losses_are_finite
