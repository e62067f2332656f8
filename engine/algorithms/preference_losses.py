"""Losses of pairs of responses: the reward model's, and those of direct preference optimisation.

A loss is the sum over this micro-batch's pairs divided by the number of pairs of the whole minibatch (all
micro-batches, all ranks): adding micro-batches up gives the mean over pairs, however the minibatch was split.
"""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, *, count: int) -> Tensor:
    """How unlikely the score differences make the human choices.

        -sum log sigmoid(s_chosen - s_rejected - margin) / count

    Bradley & Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; the margin is from Touvron et al.
    2023, https://arxiv.org/abs/2307.09288, eq. 2.

    Args:
        chosen, rejected: (P,) scores, unitless (log-odds).
        margins: (P,) in units of the scores; 0 for none.
        count: pairs of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar; finite for any finite scores, and 0 for no pairs.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check(count, chosen=chosen, rejected=rejected, margins=margins)
    return -F.logsigmoid(chosen - rejected - margins).sum() / count


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    margins: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    count: int,
) -> Tensor:
    """Direct preference optimisation: the Bradley-Terry loss of the rewards that a policy implies.

        h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)) - margin
        sum -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h), divided by count

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7; label smoothing (conservative DPO) is from Mitchell
    2023, https://ericmitchell.ai/cdpo.pdf, eq. 3; the margin (offset) from Amini et al. 2024,
    https://arxiv.org/abs/2402.10571, eq. 5.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (P,) log-probabilities of whole responses, nats.
        margins: (P,) in units of the implied reward; 0 for none.
        beta: strength of the KL constraint, > 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5).
        count: pairs of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar; ln 2 per pair while policy and ref agree and margins are 0.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check(count, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, margins=margins)
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)) - margins
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses.sum() / count


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, count: int
) -> Tensor:
    """Identity preference optimisation: draws the difference of log-ratios to 1 / (2 beta) and no further.

        sum (((chosen - ref_chosen) - (rejected - ref_rejected)) - 1 / (2 beta))^2 / count

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17 (its tau is beta here).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (P,) log-probabilities of whole responses, nats.
        beta: strength of the constraint, > 0.
        count: pairs of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check(count, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    difference = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (difference - 1 / (2 * beta)).square().sum() / count


def chosen_nll_loss(chosen: Tensor, lengths: Tensor, *, count: int) -> Tensor:
    """Keeps the chosen responses likely beside a loss of differences, which both responses of a pair may lower.

        -sum chosen / lengths, divided by count

    Pang et al. 2024, https://arxiv.org/abs/2404.19733, eq. 1.

    Args:
        chosen: (P,) log-probabilities of whole responses, nats.
        lengths: (P,) their tokens; a response without any counts as 0.
        count: pairs of the whole minibatch, over all micro-batches and ranks, > 0.

    Returns:
        scalar, nats per token.

    Raises:
        ValueError: shapes differ, or count <= 0.
    """
    _check(count, chosen=chosen, lengths=lengths)
    return -(chosen / lengths.clamp(min=1)).sum() / count


def _check(count: int, **tensors: Tensor) -> None:
    if count <= 0:
        raise ValueError(f"count={count} must be > 0: the pairs of the whole minibatch, all ranks together.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The shapes differ: {shapes}.")
