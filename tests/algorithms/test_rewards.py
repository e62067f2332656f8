"""rewards.py: F2 by hand and against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.masking import response_mask
from engine.algorithms.rewards import Moments, kl_shaped_rewards, length_penalties


def test_by_hand():
    scores = torch.tensor([10.0, 20.0, 30.0])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = response_mask(torch.tensor([3, 1, 0]), 3)
    rewards = kl_shaped_rewards(scores, kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**31), st.floats(0, 2))
def test_equals_a_plain_loop_and_ignores_padding(lengths, seed, kl_coef):
    generator = torch.Generator().manual_seed(seed)
    mask = response_mask(torch.tensor(lengths), 6)
    kl = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    expected = [[0.0] * 6 for _ in lengths]
    for i, length in enumerate(lengths):
        for t in range(length):
            expected[i][t] = -kl_coef * kl[i, t].item() + (scores[i].item() if t == length - 1 else 0)
    for garbage in (0.0, math.nan, math.inf):
        dirty_scores = scores.masked_fill(mask.sum(1) == 0, garbage)
        rewards = kl_shaped_rewards(dirty_scores, kl.masked_fill(~mask, garbage), mask, kl_coef=kl_coef)
        torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))


def test_no_columns():
    assert kl_shaped_rewards(torch.ones(2), torch.zeros(2, 0), torch.ones(2, 0).bool(), kl_coef=1.0).shape == (2, 0)


def test_wrong_shapes_are_refused_by_name():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scores"):
        kl_shaped_rewards(torch.zeros(2, 1), torch.zeros(2, 3), mask, kl_coef=1.0)
    with pytest.raises(ValueError, match="kl"):
        kl_shaped_rewards(torch.zeros(2), torch.zeros(2, 1), mask, kl_coef=1.0)


# What is done to scores


def test_moments_of_parts_are_those_of_the_whole():
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    moments = Moments()
    for part in numbers.split([1, 0, 20, 29]):
        moments = moments.with_more(part)
    assert moments.count == 50
    assert (moments.mean, moments.std) == pytest.approx((numbers.mean().item(), numbers.std(correction=0).item()))


def test_numbers_that_do_not_vary_keep_their_scale():
    assert Moments().std == 1.0
    assert Moments().with_more(torch.full((4,), 2.0)).std == 1.0


def test_penalties_on_length_by_hand():
    """Of 10 tokens the last 4 cost: nothing at 6, half at 8, all at 10 and beyond; a cut-off response costs 3 more."""
    lengths, ended = torch.tensor([2, 6, 8, 10, 10, 13]), torch.tensor([True, True, True, True, False, True])
    given = dict(overlong_penalty=2.0, overlong_tokens=4, max_response_tokens=10)
    assert length_penalties(lengths, ended, missing_eos_penalty=3.0, **given).tolist() == [0, 0, 1, 2, 5, 2]
    given |= dict(overlong_penalty=0.0, overlong_tokens=0)
    assert length_penalties(lengths, ended, missing_eos_penalty=3.0, **given).tolist() == [0, 0, 0, 0, 3, 0]
