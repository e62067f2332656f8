"""kl.py: golden numbers F3 and F11; the sampled estimators are tied to the full KL by enumerating the vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.kl import full_kl, sampled_kl, schulman_kl_coef, ziegler_kl_coef

seeds = st.integers(0, 2**31)
temperatures = st.sampled_from([0.5, 1.0, 1.7])


def test_full_kl_golden():
    kl = full_kl(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), temperature=1.0)
    assert kl.item() == pytest.approx(0.110944, abs=1e-6)


def test_full_kl_divides_both_logits_by_the_temperature():
    pi, ref = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert full_kl(pi, ref, temperature=2.0).tolist() == [pytest.approx(0.110944, abs=1e-6)]
    # KL([.5, .5] || sigmoid(+-1)) = -ln 2 - (ln .731059 + ln .268941) / 2
    assert full_kl(ref, pi, temperature=2.0).tolist() == [pytest.approx(0.120115, abs=1e-6)]


@settings(deadline=None, max_examples=40)
@given(seeds, temperatures)
def test_sampled_estimators_average_to_the_full_kl(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 11, generator=generator, dtype=torch.float64) * 2
    log_pi = torch.log_softmax(logits / temperature, -1)
    log_ref = torch.log_softmax(ref_logits / temperature, -1)
    full = full_kl(logits, ref_logits, temperature=temperature).item()
    for estimator in ("k1", "k3"):
        per_token = sampled_kl(log_pi, log_ref, estimator=estimator)
        assert sum(p * k for p, k in zip(log_pi.exp().tolist(), per_token.tolist(), strict=True)) == pytest.approx(full)
    assert full >= 0


def test_sampled_kl_by_hand():
    # pi = 0.5, ref = 0.25: r = 1/2, log r = -ln 2.
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert sampled_kl(logprobs, ref_logprobs, estimator="k1").item() == pytest.approx(math.log(2))
    assert sampled_kl(logprobs, ref_logprobs, estimator="k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert sampled_kl(logprobs, ref_logprobs, estimator="k3").item() == pytest.approx(-0.5 + math.log(2))


@settings(deadline=None, max_examples=40)
@given(st.floats(-15, 15), st.floats(-15, 15))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    for estimator in ("k2", "k3"):
        kl = sampled_kl(torch.tensor(logprob), torch.tensor(ref_logprob), estimator=estimator)
        assert kl.item() >= 0 or kl.item() == pytest.approx(0, abs=1e-9)


def test_k3_of_a_tiny_log_ratio_keeps_its_digits():
    # log r = 1e-3: k3 = 5.0017e-7; r - 1 rounded to fp32 first would be off by more than a tenth of that.
    kl = sampled_kl(torch.tensor(0.0), torch.tensor(1e-3), estimator="k3")
    assert kl.item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


def test_kl_of_equals_is_zero():
    x = torch.randn(3, 5)
    assert full_kl(x, x, temperature=0.7).tolist() == [0.0] * 3
    for estimator in ("k1", "k2", "k3"):
        assert sampled_kl(x, x, estimator=estimator).abs().max().item() == 0.0


def test_full_kl_gradient():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: full_kl(a, b, temperature=0.7), (logits, ref_logits))


def test_bf16_logits_are_softmaxed_in_fp32():
    logits, ref_logits = torch.randn(2, 4, 9).bfloat16()
    kl = full_kl(logits, ref_logits, temperature=0.7)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, full_kl(logits.float(), ref_logits.float(), temperature=0.7))


def test_kl_refusals():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="estimator='full'"):
        sampled_kl(x, x, estimator="full")
    with pytest.raises(ValueError, match="ref_logprobs"):
        sampled_kl(x, torch.zeros(1), estimator="k1")
    with pytest.raises(ValueError, match="ref_logits"):
        full_kl(x, torch.zeros(1), temperature=1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        full_kl(x, x, temperature=0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (60.0, 0.2 * (1 + 0.2 * 100 / 10000)),  # clipped above
        (0.0, 0.2 * (1 - 0.2 * 100 / 10000)),  # clipped below
        (6.6, 0.2 * (1 + 0.1 * 100 / 10000)),
    ],
)
def test_ziegler_by_hand(kl, expected):
    coef = ziegler_kl_coef(0.2, kl, target=6.0, horizon=10000, num_responses=100)
    assert coef == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("kl", "expected"), [(9.1, 0.4), (9.0, 0.2), (6.0, 0.2), (4.0, 0.2), (3.9, 0.1), (math.inf, 0.4)]
)
def test_schulman_by_hand(kl, expected):
    assert schulman_kl_coef(0.2, kl, target=6.0) == expected


@pytest.mark.parametrize("bad", [{"kl": math.nan}, {"target": 0.0}])
def test_control_refusals(bad):
    name = next(iter(bad))
    arguments = {"kl_coef": 0.2, "kl": 1.0, "target": 6.0} | bad
    with pytest.raises(ValueError, match=name):
        schulman_kl_coef(**arguments)
    with pytest.raises(ValueError, match=name):
        ziegler_kl_coef(**arguments, horizon=100, num_responses=1)
    with pytest.raises(ValueError, match="horizon"):
        ziegler_kl_coef(0.2, 1.0, target=6.0, horizon=0, num_responses=1)
