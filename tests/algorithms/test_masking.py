"""masking.py: masks from lengths; what padding holds never matters; whitening's moments."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.masking import masked_mean, masked_sum, response_mask, whiten

GARBAGE = [math.nan, math.inf, -math.inf]
lengths_lists = st.lists(st.integers(0, 6), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def test_response_mask_by_hand():
    expected = [[False, False, False], [True, True, False], [True, True, True]]
    mask = response_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@pytest.mark.parametrize("lengths", [torch.tensor([4]), torch.tensor([-1]), torch.tensor([[1]])])
def test_response_mask_refuses_bad_lengths(lengths):
    with pytest.raises(ValueError, match="lengths"):
        response_mask(lengths, 3)


def test_sum_and_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = response_mask(torch.tensor([2, 1]), 3)
    assert masked_sum(x, mask).item() == 9.0
    # A mean of the row means would be (1.5 + 6) / 2 = 3.75.
    assert masked_mean(x, mask).item() == 3.0


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("function", [masked_sum, masked_mean])
def test_padding_matters_neither_in_value_nor_in_gradient(function, garbage):
    x = torch.tensor([1.0, garbage, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    function(x, mask).backward()
    weight = 1.0 if function is masked_sum else 0.5
    assert function(x, mask).item() == weight * 4.0
    assert x.grad.tolist() == [weight, 0.0, weight]


@pytest.mark.parametrize("function", [masked_sum, masked_mean])
def test_empty_mask_gives_zero(function):
    assert function(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("function", [masked_sum, masked_mean, whiten])
def test_wrong_shape_or_dtype_is_refused_by_name(function):
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        function(torch.zeros(2, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtype"):
        function(torch.zeros(2, 3), torch.ones(2, 3))


def test_whiten_by_hand():
    # Mean 3, population variance 4 (a sample variance would be 8).
    x = torch.tensor([[1.0, 5.0, math.nan]])
    assert whiten(x, torch.tensor([[True, True, False]])).tolist() == [[pytest.approx(-1.0), pytest.approx(1.0), 0.0]]


@settings(deadline=None, max_examples=40)
@given(lengths_lists, seeds)
def test_whiten_moments_and_padding(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = response_mask(torch.tensor(lengths), 6)
    x = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * 3 + 7
    white = whiten(x.masked_fill(~mask, math.nan), mask)
    assert torch.isfinite(white).all()
    assert (white[~mask] == 0).all()
    if sum(lengths) > 1:
        assert white[mask].mean().item() == pytest.approx(0, abs=1e-9)
        assert white[mask].square().mean().item() == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(lengths_lists, seeds)
def test_whiten_does_not_depend_on_the_order_of_rows(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = response_mask(torch.tensor(lengths), 6)
    x = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(lengths), generator=generator)
    torch.testing.assert_close(whiten(x[order], mask[order]), whiten(x, mask)[order])


@pytest.mark.parametrize("entries", [[], [5.0], [0.1] * 7])
def test_whiten_without_variance_is_finite_and_near_zero(entries):
    x = torch.tensor([*entries, math.inf])
    mask = torch.tensor([True] * len(entries) + [False])
    torch.testing.assert_close(whiten(x, mask), torch.zeros_like(x), rtol=0, atol=1e-3)
