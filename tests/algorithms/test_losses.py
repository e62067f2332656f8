"""losses.py: F7 and F8 by hand, padding never leaks, micro-batches add up to the minibatch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.losses import (
    MAX_LOG_RATIO,
    clipped_policy_loss,
    clipped_value_loss,
    importance_weights,
    kl_loss,
    penalised_policy_loss,
    policy_ratio,
    policy_statistics,
    token_weights,
    value_clipped,
    weighted_sum,
)

ONE = torch.ones(1, dtype=torch.bool)
LOSSES = [
    lambda a, b, c, mask, count: clipped_policy_loss(a, b, c, mask, clip_range=0.2, count=count),
    lambda a, b, c, mask, count: clipped_value_loss(a, b, c, mask, value_clip_range=0.2, count=count),
]
both_losses = pytest.mark.parametrize("loss", LOSSES, ids=["policy", "value"])


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@st.composite
def batches(draw, shape=(4, 5)):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * 0.5
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return *tensors, mask


# (advantage, log-ratio, loss, d loss / d new_logprobs), clip range 0.2: F8 on both sides and inside.
POLICY_CASES = [
    (1.0, 0.3, -1.2, 0.0),
    (-1.0, 0.3, 1.349859, 1.349859),
    (1.0, -0.3, -0.740818, -0.740818),
    (-1.0, -0.3, 0.8, 0.0),
    (2.0, 0.1, -2.210342, -2.210342),
]


@pytest.mark.parametrize(("advantage", "log_ratio", "expected", "slope"), POLICY_CASES)
def test_policy_loss_golden(advantage, log_ratio, expected, slope):
    new_logprobs = vector(-2 + log_ratio).requires_grad_()
    loss = clipped_policy_loss(new_logprobs, vector(-2), vector(advantage), ONE, clip_range=0.2, count=1)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert new_logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


# (new value, old value, return, loss, d loss / d new value), clip range 0.2.
VALUE_CASES = [
    (0.6, 0.3, 1.0, 0.125, 0.0),  # F7: (0.5 - 1)^2 / 2, the clipped branch
    (0.6, 0.3, 0.0, 0.18, 0.6),  # too far, and the wrong way: the unclipped branch
    (0.4, 0.3, 1.0, 0.18, -0.6),  # inside
    (0.0, 0.3, -1.0, 0.605, 0.0),  # clipped from below: 0.3 - 0.2 = 0.1
]


@pytest.mark.parametrize(("new_value", "value", "target", "expected", "slope"), VALUE_CASES)
def test_value_loss_golden(new_value, value, target, expected, slope):
    new_values = vector(new_value).requires_grad_()
    loss = clipped_value_loss(new_values, vector(value), vector(target), ONE, value_clip_range=0.2, count=1)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert new_values.grad.item() == pytest.approx(slope, abs=1e-9)


def test_ratio_is_clamped():
    log_ratios = vector(0.3, 1000, -1000, math.inf)
    expected = [math.exp(0.3), math.exp(20), math.exp(-20), math.exp(20)]
    assert policy_ratio(log_ratios, vector(0, 0, 0, 0)).tolist() == pytest.approx(expected)
    assert MAX_LOG_RATIO == 20


@both_losses
@settings(deadline=None, max_examples=30)
@given(batches())
def test_count_is_the_divisor_and_only_true_tokens_add(loss, batch):
    a, b, c, mask = batch
    per_token = [
        loss(x[None], y[None], z[None], ONE, 1).item() for x, y, z in zip(a[mask], b[mask], c[mask], strict=True)
    ]
    assert loss(a, b, c, mask, 7).item() == pytest.approx(sum(per_token) / 7, abs=1e-12)


@both_losses
@settings(deadline=None, max_examples=30)
@given(batches(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_padding_never_leaks(loss, batch, garbage):
    *tensors, mask = batch
    results = []
    for fill in (0.0, garbage):
        a, b, c = (x.masked_fill(~mask, fill).requires_grad_() for x in tensors)
        value = loss(a, b, c, mask, 3)
        results.append((value.detach(), *torch.autograd.grad(value, (a, b, c))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@both_losses
@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(1, 3))
def test_micro_batches_add_up_to_the_minibatch(loss, batch, split):
    *tensors, mask = batch
    count = max(int(mask.sum()), 1)
    results = []
    for pieces in ([slice(None)], [slice(split), slice(split, None)], [slice(i, i + 1) for i in range(4)]):
        leaf = tensors[0].clone().requires_grad_()
        total = sum(loss(leaf[p], tensors[1][p], tensors[2][p], mask[p], count) for p in pieces)
        results.append((total.detach(), torch.autograd.grad(total, leaf)[0]))
    for total, grad in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


@settings(deadline=None, max_examples=30)
@given(batches())
def test_nothing_is_clipped_when_new_equals_old(batch):
    logprobs, advantages, returns, mask = batch
    assert torch.equal(policy_ratio(logprobs, logprobs), torch.ones_like(logprobs))
    statistics = policy_statistics(logprobs, logprobs, advantages, mask, clip_range=0.2)
    assert {name: x.item() for name, x in statistics.items()} == {"clipped": 0, "approx_kl": 0, "ratio_max": 1}
    assert value_clipped(logprobs, logprobs, returns, mask, value_clip_range=0.2).item() == 0
    # The policy gradient itself: -A per token.
    leaf = logprobs.clone().requires_grad_()
    clipped_policy_loss(leaf, logprobs, advantages, mask, clip_range=0.2, count=1).backward()
    torch.testing.assert_close(leaf.grad, -advantages.masked_fill(~mask, 0))


def test_policy_statistics_by_hand():
    advantages, log_ratios, *_ = zip(*POLICY_CASES, strict=True)
    new_logprobs = vector(*log_ratios, math.nan, 5)
    mask = torch.tensor([True] * 5 + [False] * 2)
    statistics = policy_statistics(
        new_logprobs, torch.zeros_like(new_logprobs), vector(*advantages, 1, math.inf), mask, clip_range=0.2
    )
    # The flat sides of the first and the fourth case.
    assert statistics["clipped"].item() == 2
    # 2 (e^.3 - 1 - .3) + 2 (e^-.3 - 1 + .3) + (e^.1 - 1 - .1)
    assert statistics["approx_kl"].item() == pytest.approx(0.186525, abs=1e-6)
    assert statistics["ratio_max"].item() == pytest.approx(1.349859, abs=1e-6)


def test_ratio_max_may_lie_below_one():
    statistics = policy_statistics(vector(-0.3), vector(0), vector(1), ONE, clip_range=0.2)
    assert statistics["ratio_max"].item() == pytest.approx(0.740818, abs=1e-6)


@pytest.mark.parametrize("n", [0, 3])
def test_statistics_of_no_token(n):
    x, mask = torch.full((n,), math.nan), torch.zeros(n, dtype=torch.bool)
    statistics = policy_statistics(x, x, x, mask, clip_range=0.2)
    assert {name: y.item() for name, y in statistics.items()} == {"clipped": 0, "approx_kl": 0, "ratio_max": 1}
    assert value_clipped(x, x, x, mask, value_clip_range=0.2).item() == 0


def test_value_clipped_by_hand():
    new_values, values, returns, *_ = zip(*VALUE_CASES, strict=True)
    mask = torch.tensor([True] * 4 + [False])
    args = vector(*new_values, 0.6), vector(*values, 0.3), vector(*returns, 1.0)
    assert value_clipped(*args, mask, value_clip_range=0.2).item() == 2


def test_statistics_carry_no_gradient():
    x = torch.zeros(2, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    assert not any(y.requires_grad for y in policy_statistics(x, x, x, mask, clip_range=0.2).values())
    assert not value_clipped(x, x, x, mask, value_clip_range=0.2).requires_grad


@both_losses
def test_refusals(loss):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for i, name in enumerate([r"new_(logprobs|values)", r"^(logprobs|values)", r"advantages|returns"]):
        args = [x, x, x]
        args[i] = torch.zeros(1, 3)
        with pytest.raises(ValueError, match=name):
            loss(*args, mask, 1)
    with pytest.raises(ValueError, match="mask has dtype"):
        loss(x, x, x, mask.float(), 1)
    with pytest.raises(ValueError, match="count=0"):
        loss(x, x, x, mask, 0)
    with pytest.raises(ValueError, match="logprobs has shape"):
        policy_ratio(x, x[:1])


def test_rounding_clips_no_value():
    torch.manual_seed(0)
    values = torch.randn(10_000)
    new_values = values + 0.19 * (2 * torch.rand(10_000) - 1)  # all inside the range
    mask = torch.ones(10_000, dtype=torch.bool)
    assert value_clipped(new_values, values, torch.randn(10_000), mask, value_clip_range=0.2).item() == 0


# The penalty, other means, and what tokens weigh


def test_the_penalty_by_hand():
    """ratio e^0.3, advantage 1, beta 2: -e^0.3 + 2 (e^0.3 - 1 - 0.3)."""
    new, old, one = torch.tensor([0.3]), torch.tensor([0.0]), torch.ones(1)
    loss = penalised_policy_loss(new, old, one, torch.ones(1, dtype=torch.bool), penalty_coef=2.0, count=1)
    assert loss.item() == pytest.approx(-math.exp(0.3) + 2 * (math.exp(0.3) - 1.3))


def test_without_a_penalty_it_is_the_unclipped_surrogate():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 50, generator=generator)
    mask = torch.ones(50, dtype=torch.bool)
    penalised = penalised_policy_loss(new, old, advantages, mask, penalty_coef=0.0, count=50)
    assert penalised.item() == pytest.approx(-(advantages * (new - old).exp()).mean().item(), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_pulls_towards_the_ref(estimator):
    new = torch.tensor([-1.0, -3.0], requires_grad=True)
    ref, mask = torch.tensor([-2.0, -2.0]), torch.ones(2, dtype=torch.bool)
    kl_loss(new, ref, mask, estimator=estimator, count=2).backward()
    assert new.grad[0] > 0 > new.grad[1], "a step down the gradient brings both nearer to -2"


def test_the_kl_in_the_loss_by_hand():
    new, ref, mask = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.ones(1, dtype=torch.bool)
    assert kl_loss(new, ref, mask, estimator="k2", count=4).item() == pytest.approx(0.5 / 4)
    assert kl_loss(new, ref, mask, estimator="k3", count=4).item() == pytest.approx((math.exp(-1.0) - 1 + 1) / 4)
    with pytest.raises(ValueError, match="'k1' has no gradient"):
        kl_loss(new, ref, mask, estimator="k1", count=4)


def test_token_weights_make_the_three_means():
    lengths = torch.tensor([1, 3, 0, 4])
    x = torch.tensor([8.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 8.0])

    def mean(kind):
        return (token_weights(lengths, mean=kind, max_response_tokens=5) * x).sum().item() / 8

    assert mean("tokens") == pytest.approx(x.mean().item())
    assert mean("responses") == pytest.approx((8 + 2 + 0 + 5) / 4)
    assert mean("constant") == pytest.approx(34 / (4 * 5))


@pytest.mark.parametrize("name", ["clipped", "penalised", "kl"])
def test_a_weight_multiplies_a_tokens_share(name):
    generator = torch.Generator().manual_seed(1)
    new, old, advantages = torch.randn(3, 6, generator=generator)
    mask, weights = torch.tensor([True] * 5 + [False]), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, math.nan])

    def loss(picked, **given):
        new_, old_, advantages_, mask_ = (tensor[picked] for tensor in (new, old, advantages, mask))
        if name == "clipped":
            return clipped_policy_loss(new_, old_, advantages_, mask_, clip_range=0.2, count=5, **given)
        if name == "penalised":
            return penalised_policy_loss(new_, old_, advantages_, mask_, penalty_coef=0.7, count=5, **given)
        return kl_loss(new_, old_, mask_, estimator="k3", count=5, **given)

    wanted = sum(weights[n] * loss(torch.tensor([n])) for n in range(5))
    torch.testing.assert_close(loss(torch.arange(6), weights=weights), wanted)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["penalised", "k2", "k3"])
def test_padding_leaks_into_neither_penalty_nor_kl(name, garbage):
    generator = torch.Generator().manual_seed(2)
    tensors, mask = torch.randn(3, 4, generator=generator), torch.tensor([True, False, True, False])
    results = []
    for fill in (0.0, garbage):
        new, old, advantages = (tensor.masked_fill(~mask, fill).requires_grad_() for tensor in tensors)
        if name == "penalised":
            loss = penalised_policy_loss(new, old, advantages, mask, penalty_coef=0.7, count=2)
        else:
            loss = kl_loss(new, old, mask, estimator=name, count=2)
        results.append((loss.detach(), torch.autograd.grad(loss, new)[0]))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


def test_a_weight_that_is_no_number_reaches_no_gradient_from_padding():
    x, mask = torch.tensor([2.0, math.nan], requires_grad=True), torch.tensor([True, False])
    total = weighted_sum(x, mask, torch.tensor([3.0, math.nan]))
    total.backward()
    assert total.item() == 6 and x.grad.tolist() == [3, 0]


def test_importance_weights_are_cut_off_and_carry_no_gradient():
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weights = importance_weights(logprobs, torch.tensor([-1.0, -2.0, 0.0]), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)]) and not weights.requires_grad
