"""Advantages without a critic: a response is judged by the other responses to the same prompt."""

from typing import Literal

import torch
from torch import Tensor

from engine.algorithms.advantages import monte_carlo
from engine.algorithms.rewards import kl_shaped_rewards

# Added to the standard deviation, so that a group of equal scores has no advantages and not 0 / 0.
STD_EPS = 1e-6


@torch.no_grad()
def group_normalised(scores: Tensor, *, group_size: int, left_out: Tensor | None = None) -> Tensor:
    """GRPO: how far a score lies from its group's mean, in the group's standard deviations.

        A_i = (s_i - mean(s)) / (std(s) + STD_EPS)        std: divided by G - 1

    Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.

    Args:
        scores: (B,) one per response; a group is `group_size` neighbours, the responses to one prompt.
        group_size: G, at least 2.
        left_out: (B,) bool; rows that nobody scored. A group is then the others.

    Returns:
        (B,), unitless; 0 for a group whose scores are all the same, for one of one row, and for what is left out.

    Raises:
        ValueError: scores cannot be cut into such groups.
    """
    centred, sizes = _centred(scores, group_size, left_out)
    std = (centred.square().sum(1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
    return (centred / (std + STD_EPS)).view(-1).to(scores.dtype)


@torch.no_grad()
def group_centred(scores: Tensor, *, group_size: int, left_out: Tensor | None = None) -> Tensor:
    """Dr. GRPO, and REINFORCE++'s baseline: how far a score lies from its group's mean.

        A_i = s_i - mean(s)

    Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.2; Hu et al. 2025, https://arxiv.org/abs/2501.03262.

    Args:
        scores, group_size, left_out: as for `group_normalised`.

    Returns:
        (B,), in units of the scores.

    Raises:
        ValueError: scores cannot be cut into such groups.
    """
    return _centred(scores, group_size, left_out)[0].view(-1).to(scores.dtype)


@torch.no_grad()
def leave_one_out(scores: Tensor, *, group_size: int, left_out: Tensor | None = None) -> Tensor:
    """RLOO: how far a score lies from the mean of the others of its group.

        A_i = s_i - sum_{j != i} s_j / (G - 1)

    Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740, section 3.

    Args:
        scores, group_size, left_out: as for `group_normalised`.

    Returns:
        (B,), in units of the scores.

    Raises:
        ValueError: scores cannot be cut into such groups.
    """
    centred, sizes = _centred(scores, group_size, left_out)
    return (centred * sizes / (sizes - 1).clamp(min=1)).view(-1).to(scores.dtype)


@torch.no_grad()
def critic_free_advantages(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"],
    group_size: int,
    gamma: float,
    left_out: Tensor | None = None,
) -> Tensor:
    """An advantage for every token, from the scores alone.

        grpo, dr_grpo, rloo           that of the response, of its score less kl_coef * its KL, for each of its tokens
        reinforce_plus_plus           the rewards still to come (REINFORCE; no baseline but the whitening that follows)
        reinforce_plus_plus_baseline  the same, of scores less their group's mean

    Args:
        scores: (B,).
        kl: (B, R), nats; what it holds on padding does not matter.
        mask: (B, R) bool; each row is Trues followed by Falses.
        kl_coef: of the penalty in the rewards; 0 where it is in the loss.
        group_size: responses per prompt; for `reinforce_plus_plus` any.
        gamma: discount per token, of the two REINFORCE++.
        left_out: (B,) bool; rows that nobody scored, which are compared with nothing.

    Returns:
        (B, R), zero on padding.

    Raises:
        ValueError: another estimator, or scores that cannot be cut into groups.
    """
    groups = dict(group_size=group_size, left_out=left_out)
    if estimator.startswith("reinforce_plus_plus"):
        centred = scores if estimator == "reinforce_plus_plus" else group_centred(scores, **groups)
        return monte_carlo(kl_shaped_rewards(centred, kl, mask, kl_coef=kl_coef), mask, gamma=gamma)
    of_response = {"grpo": group_normalised, "dr_grpo": group_centred, "rloo": leave_one_out}
    if estimator not in of_response:
        raise ValueError(f"estimator={estimator!r} is not one of the critic-free ones.")
    totals = scores - kl_coef * kl.masked_fill(~mask, 0).sum(1)
    advantages = of_response[estimator](totals, **groups)
    return advantages[:, None].expand_as(kl).masked_fill(~mask, 0)


def _centred(scores: Tensor, group_size: int, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B / G, G) float64: how far each score is from its group's mean, 0 for what is left out; (B / G, 1) group sizes.

    In float64, since in float32 the mean of equal scores can be another number, which a tiny deviation would blow up.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size={group_size} must be at least 2: a response is judged by the others of its group."
        )
    if scores.dim() != 1 or len(scores) % group_size:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, must be (B,) with B a multiple of {group_size}.")
    groups = scores.view(-1, group_size).double()
    counts = torch.ones_like(groups, dtype=torch.bool) if left_out is None else ~left_out.view(-1, group_size)
    sizes = counts.sum(1, keepdim=True)
    mean = groups.masked_fill(~counts, 0).sum(1, keepdim=True) / sizes.clamp(min=1)
    return (groups - mean).masked_fill(~counts, 0), sizes
