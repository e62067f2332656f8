"""Rewards and values -> advantages, and the three targets that a critic can be trained on.

All of them take finished responses (nothing is bootstrapped past the last token) and carry no gradient.
"""

import torch
from torch import Tensor

from engine.algorithms.masking import check_shapes


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of finished responses.

        delta_t = r_t + gamma * V_{t+1} - V_t        with V = 0 past the last real token
        A_t     = delta_t + gamma * lam * A_{t+1}

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.

    Args:
        rewards, values: (B, R), in reward units; what they hold on padding does not matter.
        mask: (B, R) bool; each row is Trues followed by Falses.
        gamma, lam: discount per token and GAE's decay, both 0..1.

    Returns:
        advantages, returns: (B, R), zero on padding; returns = advantages + values.

    Raises:
        ValueError: shapes differ.
    """
    targets = temporal_difference(rewards, values, mask, gamma=gamma)
    values = values.masked_fill(~mask, 0)
    advantages = _discounted_sums(targets - values, gamma * lam)
    return advantages, advantages + values


@torch.no_grad()
def monte_carlo(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Value targets: the discounted rewards still to come.

        return_t = sum_k gamma^k r_{t+k}

    Sutton and Barto 2018, http://incompleteideas.net/book/the-book-2nd.html, eq. 3.8.

    Args:
        rewards: (B, R), in reward units; what it holds on padding does not matter.
        mask: (B, R) bool; each row is Trues followed by Falses.
        gamma: discount per token, 0..1.

    Returns:
        (B, R), zero on padding.

    Raises:
        ValueError: shapes differ.
    """
    check_shapes(mask, rewards=rewards)
    return _discounted_sums(rewards.masked_fill(~mask, 0), gamma)


@torch.no_grad()
def temporal_difference(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Value targets: one reward, then the critic's own estimate.

        return_t = r_t + gamma * V_{t+1}        with V = 0 past the last real token

    Sutton 1988, https://doi.org/10.1007/BF00115009.

    Args:
        rewards, values: (B, R), in reward units; what they hold on padding does not matter.
        mask: (B, R) bool; each row is Trues followed by Falses.
        gamma: discount per token, 0..1.

    Returns:
        (B, R), zero on padding.

    Raises:
        ValueError: shapes differ.
    """
    check_shapes(mask, rewards=rewards, values=values)
    values = values.masked_fill(~mask, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return rewards.masked_fill(~mask, 0) + gamma * next_values


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount * y_{t+1} along the columns of (B, R); zero on padding where x is."""
    sums = torch.empty_like(x)
    running = x.new_zeros(x.shape[0])
    for t in reversed(range(x.shape[1])):
        running = x[:, t] + discount * running
        sums[:, t] = running
    return sums
