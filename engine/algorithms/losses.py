"""PPO's clipped policy and value losses, and the counts that say how often a clip was active.

A loss is the sum over this micro-batch's tokens divided by the token count of the whole minibatch (all micro-batches,
all ranks): adding micro-batches up gives the mean over tokens, however the minibatch was split.
"""

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
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float, count: int
) -> Tensor:
    """PPO-clip, as a loss.

        sum_t max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_range, 1 + clip_range)) / count

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.

    Args:
        new_logprobs, logprobs: any shape, nats; only new_logprobs carries a gradient.
        advantages: the same shape, in reward units (unitless when whitened).
        mask: bool, the same shape; what the others hold where it is False does not matter, nor for the gradient.
        clip_range: half-width of the interval around ratio 1.
        count: response tokens of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check_count(count)
    unclipped, clipped = _policy_branches(new_logprobs, logprobs, advantages, mask, clip_range)
    return masked_sum(torch.maximum(unclipped, clipped), mask) / count


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
