"""preference_losses.py against published numbers, hand arithmetic, and the law that micro-batches add up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.preference_losses import bradley_terry_loss, chosen_nll_loss, dpo_loss, ipo_loss

LN2 = math.log(2)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def none_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def dpo(chosen, rejected, ref_chosen, ref_rejected, margins=None, *, beta=0.1, label_smoothing=0.0, count=None):
    margins = none_like(chosen) if margins is None else margins
    settings_ = dict(beta=beta, label_smoothing=label_smoothing, count=count or len(chosen))
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, margins, **settings_)


# Bradley-Terry


def test_scores_of_one_and_a_half():
    loss = bradley_terry_loss(numbers(1.0), numbers(0.5), numbers(0.0), count=1)
    assert loss.item() == pytest.approx(0.474077, abs=1e-6)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)


def test_equal_scores_are_ln_2():
    assert bradley_terry_loss(numbers(3.0, -1), numbers(3.0, -1), numbers(0, 0), count=2).item() == pytest.approx(LN2)


def test_the_reward_margin_is_taken_off_the_difference():
    got = bradley_terry_loss(numbers(2.0), numbers(0.5), numbers(1.0), count=1)
    assert got.item() == pytest.approx(math.log(1 + math.exp(-(2.0 - 0.5 - 1.0))), abs=1e-6)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_bradley_terry_is_finite_far_out(margin):
    chosen, rejected = numbers(margin).requires_grad_(), numbers(0.0).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, numbers(0.0), count=1)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -margin))
    assert chosen.grad.item() == pytest.approx(0.0 if margin > 0 else -1.0)
    assert rejected.grad.item() == -chosen.grad.item()


def test_the_gradient_is_how_wrong_the_model_is():
    """d loss / d s_chosen = -sigmoid(-(s_chosen - s_rejected)) / count."""
    chosen = numbers(1.0, -2.0).requires_grad_()
    bradley_terry_loss(chosen, numbers(0.5, 1.0), numbers(0.0, 0.0), count=2).backward()
    wanted = [-1 / (1 + math.exp(0.5)) / 2, -1 / (1 + math.exp(-3.0)) / 2]
    assert chosen.grad.tolist() == pytest.approx(wanted, abs=1e-6)


def test_no_pairs_are_a_loss_of_zero_that_has_a_gradient():
    nothing = torch.empty(0, requires_grad=True)
    loss = bradley_terry_loss(nothing, nothing, torch.empty(0), count=4)
    loss.backward()
    assert loss.item() == 0.0 and nothing.grad.shape == (0,)


# DPO


def test_dpo_of_plus_two_and_minus_one():
    loss = dpo(numbers(-8.0), numbers(-6.0), numbers(-10.0), numbers(-5.0))
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * 3)), abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_begins_at_ln_2_whatever_beta_and_smoothing_are(label_smoothing):
    policy = numbers(-3.0, -7.0), numbers(-4.0, -1.0)
    for beta in (0.01, 0.1, 5.0):
        assert dpo(*policy, *policy, beta=beta, label_smoothing=label_smoothing).item() == pytest.approx(LN2)


def test_label_smoothing_by_hand():
    """h = 0.5 * 3 = 1.5; 0.8 ln(1 + e^-1.5) + 0.2 ln(1 + e^1.5) = 0.8 * 0.201413 + 0.2 * 1.701413."""
    loss = dpo(numbers(2.0), numbers(-1.0), numbers(0.0), numbers(0.0), beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.501413, abs=1e-6)


def test_with_smoothing_a_pair_can_be_too_sure():
    """The least is where sigmoid(h) = 1 - label_smoothing; beyond it the loss rises again."""
    best = math.log(0.8 / 0.2)
    losses = [
        dpo(numbers(h), numbers(0.0), numbers(0.0), numbers(0.0), beta=1.0, label_smoothing=0.2).item()
        for h in (best - 1, best, best + 1)
    ]
    assert losses[1] == min(losses) and losses[1] > 0


def test_the_offset_of_dpo_is_in_units_of_the_implied_reward():
    loss = dpo(numbers(2.0), numbers(-1.0), numbers(0.0), numbers(0.0), numbers(0.2), beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-(0.1 * 3 - 0.2))), abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_dpo_is_finite_far_out(margin, label_smoothing):
    chosen = numbers(margin).requires_grad_()
    loss = dpo(chosen, numbers(0.0), numbers(0.0), numbers(0.0), beta=1.0, label_smoothing=label_smoothing)
    loss.backward()
    wrong = label_smoothing if margin > 0 else 1 - label_smoothing
    assert loss.item() == pytest.approx(wrong * 1e4, rel=1e-6)
    assert chosen.grad.item() == pytest.approx(math.copysign(wrong, margin), abs=1e-6)


def test_chosen_and_rejected_are_not_to_be_swapped():
    better = dpo(numbers(-1.0), numbers(-2.0), numbers(-2.0), numbers(-2.0))
    worse = dpo(numbers(-2.0), numbers(-1.0), numbers(-2.0), numbers(-2.0))
    assert better < LN2 < worse


# IPO


def test_ipo_by_hand():
    """(2 - (-1) - 1 / (2 * 0.1))^2 = (3 - 5)^2."""
    assert ipo_loss(
        numbers(-8.0), numbers(-6.0), numbers(-10.0), numbers(-5.0), beta=0.1, count=1
    ).item() == pytest.approx(4.0)


def test_ipo_is_content_at_one_over_two_beta():
    assert ipo_loss(numbers(2.0), numbers(0.0), numbers(0.0), numbers(0.0), beta=0.25, count=1).item() == 0.0


def test_ipo_is_finite_far_out():
    chosen = numbers(1e4, -1e4).requires_grad_()
    loss = ipo_loss(chosen, numbers(0, 0), numbers(0, 0), numbers(0, 0), beta=0.5, count=2)
    loss.backward()
    assert loss.item() == pytest.approx(((1e4 - 1) ** 2 + (1e4 + 1) ** 2) / 2, rel=1e-6)
    assert chosen.grad.tolist() == pytest.approx([1e4 - 1, -1e4 - 1])


# Likelihood of the chosen


def test_the_chosen_weigh_the_same_whatever_their_length():
    lengths = torch.tensor([4, 2])
    assert chosen_nll_loss(numbers(-8.0, -6.0), lengths, count=2).item() == pytest.approx((8 / 4 + 6 / 2) / 2)
    assert chosen_nll_loss(numbers(0.0), torch.tensor([0]), count=1).item() == 0.0, "a response without tokens"


# Laws

FINITE = st.floats(-30, 30, width=32)
PAIRS = st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE, st.floats(0, 3, width=32)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(PAIRS, st.data())
def test_micro_batches_add_up_to_the_mean_over_pairs(pairs, data):
    columns = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    cut = data.draw(st.integers(0, len(pairs)))
    losses = {
        "bradley_terry": lambda c, r, rc, rr, m, count: bradley_terry_loss(c, r, m, count=count),
        "dpo": lambda *given_, count: dpo_loss(*given_, beta=0.3, label_smoothing=0.1, count=count),
        "ipo": lambda c, r, rc, rr, m, count: ipo_loss(c, r, rc, rr, beta=0.3, count=count),
    }
    for name, loss in losses.items():
        whole = loss(*columns, count=len(pairs)).item()
        parts = [
            loss(*(column[part] for column in columns), count=len(pairs)).item()
            for part in (slice(cut), slice(cut, None))
        ]
        alone = [loss(*(column[row : row + 1] for column in columns), count=1).item() for row in range(len(pairs))]
        assert sum(parts) == pytest.approx(whole, rel=1e-9, abs=1e-12), name
        assert sum(alone) / len(alone) == pytest.approx(whole, rel=1e-9, abs=1e-12), name


@settings(deadline=None, max_examples=100)
@given(FINITE, FINITE, FINITE, FINITE)
def test_dpo_is_bradley_terry_of_the_implied_rewards(chosen, rejected, ref_chosen, ref_rejected):
    got = dpo(*(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected)), beta=0.2)
    h = 0.2 * (chosen - ref_chosen) - 0.2 * (rejected - ref_rejected)
    assert got.item() == pytest.approx(math.log1p(math.exp(-h)), rel=1e-9)


# What is refused

TWO, THREE = torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_that_is_not_positive_is_refused(count):
    for call in (
        lambda: bradley_terry_loss(TWO, TWO, TWO, count=count),
        lambda: dpo_loss(TWO, TWO, TWO, TWO, TWO, beta=0.1, label_smoothing=0.0, count=count),
        lambda: ipo_loss(TWO, TWO, TWO, TWO, beta=0.1, count=count),
        lambda: chosen_nll_loss(TWO, TWO, count=count),
    ):
        with pytest.raises(ValueError, match=f"count={count} must be > 0"):
            call()


@pytest.mark.parametrize("odd", range(5))
def test_shapes_that_differ_are_refused_by_name(odd):
    """A (3,) against a (3, 1) would broadcast to (3, 3) and average pairs that never met."""
    for other in (TWO, torch.zeros(3, 1)):
        given_ = [other if place == odd else THREE for place in range(5)]
        with pytest.raises(ValueError, match=r"shapes differ.*'rejected'"):
            dpo_loss(*given_, beta=0.1, label_smoothing=0.0, count=3)
        if odd < 4:
            with pytest.raises(ValueError, match=r"shapes differ.*'ref_chosen'"):
                ipo_loss(*given_[:4], beta=0.1, count=3)
        if odd < 3:
            with pytest.raises(ValueError, match=r"shapes differ.*'margins'"):
                bradley_terry_loss(*given_[:3], count=3)
