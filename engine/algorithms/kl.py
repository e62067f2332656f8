"""KL between the actor and the ref, exact or from the sampled token, and the two rules that adapt its coefficient."""

import math
from typing import Literal

import torch
from torch import Tensor


def full_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(pi || ref) over the whole vocabulary, per position.

        sum_v pi(v) (log pi(v) - log ref(v))        pi = softmax(logits / temperature), ref likewise

    Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694; as the RLHF penalty: Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.

    Args:
        logits, ref_logits: (..., V), finite; the softmax is taken in fp32 at least.
        temperature: > 0, the one that responses are sampled at.

    Returns:
        (...), nats, differentiable in both.

    Raises:
        ValueError: shapes differ, or temperature <= 0.
    """
    if ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits has shape {tuple(ref_logits.shape)}, logits has {tuple(logits.shape)}.")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_pi = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    log_ref = torch.log_softmax(ref_logits.to(dtype) / temperature, dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


def sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(pi || ref) from one token sampled from pi, with r = ref / pi of that token.

        k1 = -log r                unbiased, either sign
        k2 = (log r)^2 / 2         biased, never negative
        k3 = (r - 1) - log r       unbiased, never negative

    Schulman 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs, ref_logprobs: the same shape, nats, of the sampled tokens.
        estimator: which of the three.

    Returns:
        the same shape, nats.

    Raises:
        ValueError: shapes differ, or another estimator.
    """
    if ref_logprobs.shape != logprobs.shape:
        raise ValueError(f"ref_logprobs has shape {tuple(ref_logprobs.shape)}, logprobs has {tuple(logprobs.shape)}.")
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        # expm1: r - 1 of a small log r would lose all its digits in fp32.
        return torch.expm1(log_r) - log_r
    raise ValueError(f"estimator={estimator!r} is not one of 'k1', 'k2', 'k3' (full_kl is a function of its own).")


def ziegler_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_responses: int) -> float:
    """The KL coefficient for the next iteration, moved in proportion to the error, by at most 20% per horizon.

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon)

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    Args:
        kl_coef: the present coefficient.
        kl: mean over responses of the KL summed over a response, nats.
        target: the KL aimed at, nats per response, > 0.
        horizon: responses, > 0.
        num_responses: responses that kl was measured on, all ranks together.

    Raises:
        ValueError: target or horizon <= 0, or kl is NaN.
    """
    _check_control(kl, target)
    if horizon <= 0:
        raise ValueError(f"horizon={horizon} must be > 0 responses.")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


def schulman_kl_coef(kl_coef: float, kl: float, *, target: float) -> float:
    """The KL coefficient for the next iteration, doubled or halved when the KL is well off its target.

        kl_coef * 2 if kl > 1.5 * target;   kl_coef / 2 if kl < target / 1.5;   else kl_coef

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 4.

    Args:
        kl_coef: the present coefficient.
        kl: the measured KL, nats, in the unit of target.
        target: the KL aimed at, nats, > 0.

    Raises:
        ValueError: target <= 0, or kl is NaN.
    """
    _check_control(kl, target)
    if kl > 1.5 * target:
        return kl_coef * 2
    if kl < target / 1.5:
        return kl_coef / 2
    return kl_coef


def _check_control(kl: float, target: float) -> None:
    if target <= 0:
        raise ValueError(f"target={target} must be > 0 nats.")
    # Comparisons with NaN are False: it would pass for a KL on target, or at the clip, and go unseen.
    if math.isnan(kl):
        raise ValueError("kl is nan: the coefficient cannot follow it. Look for NaN in logprobs or ref_logprobs.")
