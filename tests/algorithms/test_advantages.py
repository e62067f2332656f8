"""advantages.py: F4-F6 by hand, against slow loops over Python lists, and against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import gae, monte_carlo, temporal_difference
from engine.algorithms.masking import response_mask

REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.1, 0.2, 0.3]])
ALL = torch.ones(1, 3, dtype=torch.bool)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = response_mask(torch.tensor(lengths), 6)
    rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    garbage = draw(st.sampled_from([0.0, 3.0, math.nan, math.inf, -math.inf]))
    return rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask


discounts = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def rows(x, mask):
    return [row[real].tolist() for row, real in zip(x, mask, strict=True)]


def padded(lists):
    return torch.tensor([row + [0.0] * (6 - len(row)) for row in lists], dtype=torch.float64)


def test_monte_carlo_golden():
    assert monte_carlo(REWARDS, ALL, gamma=1.0).tolist() == [[1.0, 1.0, 1.0]]
    assert monte_carlo(REWARDS, ALL, gamma=0.5).tolist() == [[0.25, 0.5, 1.0]]


def test_temporal_difference_golden():
    expected = torch.tensor([[0.2, 0.3, 1.0]])
    torch.testing.assert_close(temporal_difference(REWARDS, VALUES, ALL, gamma=1.0), expected)


def test_gae_golden():
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.82675, 0.765, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.92675, 0.965, 1.0]]))


@settings(deadline=None, max_examples=40)
@given(batches(), discounts)
def test_monte_carlo_equals_the_double_sum(batch, gamma):
    rewards, _, mask = batch
    expected = [
        [sum(gamma**k * row[t + k] for k in range(len(row) - t)) for t in range(len(row))]
        for row in rows(rewards, mask)
    ]
    torch.testing.assert_close(monte_carlo(rewards, mask, gamma=gamma), padded(expected))


def deltas(reward_row, value_row, gamma):
    next_values = [*value_row[1:], 0.0]
    return [r + gamma * n - v for r, n, v in zip(reward_row, next_values, value_row, strict=False)]


@settings(deadline=None, max_examples=40)
@given(batches(), discounts)
def test_temporal_difference_equals_a_loop(batch, gamma):
    rewards, values, mask = batch
    expected = [
        [d + v for d, v in zip(deltas(r, v_row, gamma), v_row, strict=True)]
        for r, v_row in zip(rows(rewards, mask), rows(values, mask), strict=True)
    ]
    torch.testing.assert_close(temporal_difference(rewards, values, mask, gamma=gamma), padded(expected))


@settings(deadline=None, max_examples=40)
@given(batches(), discounts, discounts)
def test_gae_equals_the_double_sum(batch, gamma, lam):
    rewards, values, mask = batch
    expected = []
    for reward_row, value_row in zip(rows(rewards, mask), rows(values, mask), strict=True):
        delta = deltas(reward_row, value_row, gamma)
        expected.append(
            [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]
        )
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, padded(expected))
    torch.testing.assert_close(returns, padded(expected) + values.masked_fill(~mask, 0))


@settings(deadline=None, max_examples=40)
@given(batches(), discounts)
def test_gae_lies_between_temporal_difference_and_monte_carlo(batch, gamma):
    rewards, values, mask = batch
    clean = values.masked_fill(~mask, 0)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    torch.testing.assert_close(advantages, monte_carlo(rewards, mask, gamma=gamma) - clean)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    torch.testing.assert_close(advantages, temporal_difference(rewards, values, mask, gamma=gamma) - clean)


def test_no_gradient():
    values = VALUES.clone().requires_grad_()
    rewards = REWARDS.clone().requires_grad_()
    outputs = [
        *gae(rewards, values, ALL, gamma=1.0, lam=0.95),
        monte_carlo(rewards, ALL, gamma=1.0),
        temporal_difference(rewards, values, ALL, gamma=1.0),
    ]
    assert not any(output.requires_grad for output in outputs)


def test_no_columns():
    empty, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    assert gae(empty, empty, mask, gamma=1.0, lam=0.95)[0].shape == (2, 0)
    assert monte_carlo(empty, mask, gamma=1.0).shape == (2, 0)


def test_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="values"):
        gae(REWARDS, VALUES[:, :2], ALL, gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match="rewards"):
        monte_carlo(REWARDS[:, :2], ALL, gamma=1.0)
    with pytest.raises(ValueError, match="values"):
        temporal_difference(REWARDS, VALUES[0], ALL, gamma=1.0)
