"""PPO's policy and value losses, and the counts that say how often a clip was active.

A loss is the sum over this micro-batch's tokens divided by the token count of the whole minibatch (all micro-batches,
all ranks): adding micro-batches up gives the mean over tokens, however the minibatch was split. Weights of tokens make
other means of it (`token_weights`), or correct for the policy that sampled (`importance_weights`).
"""

from typing import Literal

import torch
from torch import Tensor

from engine.algorithms.kl import sampled_kl
from engine.algorithms.masking import check_shapes, masked_sum

# exp(20) = 5e8: far outside any clip range, far inside fp32.
MAX_LOG_RATIO = 20.0


def policy_ratio(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """How much likelier a token is under the weights being trained than it was at sampling time.

        exp(clip(new_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 3.

    Args:
        new_logprobs, logprobs: the same shape, nats, at the same temperature.

    Returns:
        the same shape.

    Raises:
        ValueError: shapes differ.
    """
    return _log_ratio(new_logprobs, logprobs).exp()


def clipped_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    count: int,
    weights: Tensor | None = None,
) -> Tensor:
    """PPO-clip, as a loss.

        sum_t w_t max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_range, 1 + clip_range)) / count

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.

    Args:
        new_logprobs, logprobs: any shape, nats; only new_logprobs carries a gradient.
        advantages: the same shape, in reward units (unitless when whitened).
        mask: bool, the same shape; what the others hold where it is False does not matter, nor for the gradient.
        clip_range: half-width of the interval around ratio 1.
        count: response tokens of the whole minibatch, over all micro-batches and ranks, > 0.
        weights: w_t, the same shape; 1 when not given.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check_count(count)
    unclipped, clipped = _policy_branches(new_logprobs, logprobs, advantages, mask, clip_range)
    return weighted_sum(torch.maximum(unclipped, clipped), mask, weights) / count


def penalised_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    penalty_coef: float,
    count: int,
    weights: Tensor | None = None,
) -> Tensor:
    """PPO with a penalty in place of the clip.

        sum_t w_t (-A_t * ratio_t + penalty_coef * KL_t) / count        KL_t = (ratio_t - 1) - log ratio_t

    KL_t estimates KL(old || new) from the tokens that the old policy drew (k3 of Schulman 2020,
    http://joschu.net/blog/kl-approx.html). Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 8.

    Args:
        new_logprobs, logprobs, advantages, mask, count, weights: as for clipped_policy_loss.
        penalty_coef: beta, in units of the advantages per nat.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check_count(count)
    surrogate, _ = _policy_branches(new_logprobs, logprobs, advantages, mask, 0.0)
    log_ratio = _log_ratio(new_logprobs.masked_fill(~mask, 0), logprobs.masked_fill(~mask, 0))
    kl = torch.expm1(log_ratio) - log_ratio
    return weighted_sum(surrogate + penalty_coef * kl, mask, weights) / count


def kl_loss(
    new_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Literal["k2", "k3"],
    count: int,
    weights: Tensor | None = None,
) -> Tensor:
    """The KL to the ref as a term of the loss, where it is not in the rewards.

        sum_t w_t KL_t / count

    Of k1 the gradient says nothing about the KL (its expectation is 0), so it is refused here. That of k2 is the KL's
    own while the tokens are the policy's. Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 4 (k3).

    Args:
        new_logprobs, ref_logprobs: any shape, nats; only new_logprobs carries a gradient.
        mask, count, weights: as for clipped_policy_loss.

    Returns:
        scalar, nats.

    Raises:
        ValueError: shapes differ, count <= 0, or another estimator.
    """
    _check_count(count)
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator={estimator!r} has no gradient that lowers the KL; take 'k2', 'k3' or the full KL.")
    check_shapes(mask, new_logprobs=new_logprobs, ref_logprobs=ref_logprobs)
    new_logprobs, ref_logprobs = new_logprobs.masked_fill(~mask, 0), ref_logprobs.masked_fill(~mask, 0)
    return weighted_sum(sampled_kl(new_logprobs, ref_logprobs, estimator=estimator), mask, weights) / count


def token_weights(
    response_lengths: Tensor, *, mean: Literal["tokens", "responses", "constant"], max_response_tokens: int
) -> Tensor:
    """What each token of a minibatch weighs, so that a sum over tokens divided by their number N is the wanted mean.

        tokens:     1                   every token weighs the same
        responses:  N / (B length_i)    every response does: the mean of the responses' means (GRPO)
        constant:   N / (B max)         the sum over tokens divided by a constant (Dr. GRPO)

    Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3; Liu et al. 2025, https://arxiv.org/abs/2503.20783,
    section 3.2.

    Args:
        response_lengths: (B,) int64, of the whole minibatch.
        max_response_tokens: of a response.

    Returns:
        (N,) fp32, row after row.
    """
    tokens, responses = int(response_lengths.sum()), len(response_lengths)
    if mean == "tokens":
        return torch.ones(tokens)
    if mean == "constant":
        return torch.full((tokens,), tokens / (responses * max_response_tokens))
    per_row = tokens / (responses * response_lengths.clamp(min=1).float())
    return per_row.repeat_interleave(response_lengths)


@torch.no_grad()
def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, *, cap: float) -> Tensor:
    """How much likelier a token was under the policy that is trained than under the one that sampled it, cut off.

        min(exp(logprobs - behaviour_logprobs), cap)

    The two differ where decoding computes in another way than training: filters, lower precision, another engine. Yao
    et al. 2025, https://fengyao.notion.site/off-policy-rl (truncated importance sampling); Ionides 2008,
    https://doi.org/10.1198/106186008X320456.

    Args:
        logprobs, behaviour_logprobs: the same shape, nats.
        cap: >= 1.

    Returns:
        the same shape.

    Raises:
        ValueError: shapes differ.
    """
    return policy_ratio(logprobs, behaviour_logprobs).clamp(max=cap)


def weighted_sum(x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """masked_sum of x, each entry times its weight if there are any."""
    if weights is None:
        return masked_sum(x, mask)
    check_shapes(mask, weights=weights)
    return masked_sum(x * weights.masked_fill(~mask, 0), mask)


def clipped_value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float, count: int
) -> Tensor:
    """Squared error of the critic, with no gain from moving a value by more than value_clip_range.

        0.5 * sum_t max((V_t - R_t)^2, (clip(V_t, old V_t - range, old V_t + range) - R_t)^2) / count

    In PPO's code but not in its paper; Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, section 3.

    Args:
        new_values, values, returns: any shape, in reward units; only new_values carries a gradient.
        mask: bool, the same shape; what the others hold where it is False does not matter, nor for the gradient.
        value_clip_range: in reward units.
        count: response tokens of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check_count(count)
    unclipped, clipped = _value_branches(new_values, values, returns, mask, value_clip_range)
    return 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask) / count


@torch.no_grad()
def policy_statistics(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> dict[str, Tensor]:
    """What to watch of clipped_policy_loss. Sums and a max, so that they combine over micro-batches and ranks.

    approx_kl is the k3 estimator of KL(old || new), Schulman 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        new_logprobs, logprobs, advantages, mask, clip_range: as for clipped_policy_loss.

    Returns:
        three scalars:
        clipped: number of tokens where the clipped branch is the larger (add up);
        approx_kl: sum over tokens of (ratio - 1) - log ratio, nats (add up);
        ratio_max: largest ratio of a True token, 1 when there is none (take the max).

    Raises:
        ValueError: shapes differ.
    """
    unclipped, clipped = _policy_branches(new_logprobs, logprobs, advantages, mask, clip_range)
    log_ratio = _log_ratio(new_logprobs, logprobs)
    approx_kl = sampled_kl(torch.zeros_like(log_ratio), log_ratio, estimator="k3")
    ratios = log_ratio[mask].exp()
    return {
        "clipped": masked_sum((clipped > unclipped).to(log_ratio.dtype), mask),
        "approx_kl": masked_sum(approx_kl, mask),
        "ratio_max": ratios.max() if ratios.numel() else ratios.new_ones(()),
    }


@torch.no_grad()
def value_clipped(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float
) -> Tensor:
    """Number of tokens where the clipped branch of clipped_value_loss is the larger (add up over micro-batches).

    Args:
        new_values, values, returns, mask, value_clip_range: as for clipped_value_loss.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ.
    """
    unclipped, clipped = _value_branches(new_values, values, returns, mask, value_clip_range)
    return masked_sum((clipped > unclipped).to(unclipped.dtype), mask)


def _log_ratio(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    if logprobs.shape != new_logprobs.shape:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, new_logprobs has {tuple(new_logprobs.shape)}.")
    return (new_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _policy_branches(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    check_shapes(mask, new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    # Padding is filled before the arithmetic: masking the result alone leaves 0 * NaN in backward. (For the ratio,
    # clamp's backward happens to hide it; nothing should lean on that.)
    ratio = policy_ratio(new_logprobs.masked_fill(~mask, 0), logprobs.masked_fill(~mask, 0))
    advantages = advantages.masked_fill(~mask, 0)
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)


def _value_branches(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, value_clip_range: float
) -> tuple[Tensor, Tensor]:
    check_shapes(mask, new_values=new_values, values=values, returns=returns)
    new_values, values, returns = (x.masked_fill(~mask, 0) for x in (new_values, values, returns))
    # Not values + (new_values - values).clamp(...): its rounding would make some unclipped tokens look clipped.
    clipped_values = new_values.clamp(values - value_clip_range, values + value_clip_range)
    return (new_values - returns).square(), (clipped_values - returns).square()


def _check_count(count: int) -> None:
    if count <= 0:
        raise ValueError(f"count={count} must be > 0: the response tokens of the whole minibatch, all ranks together.")
