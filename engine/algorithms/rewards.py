"""Score and KL penalty -> one reward per response token."""

from torch import Tensor

from engine.algorithms.masking import check_shapes


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each response token: a KL penalty everywhere, the score on the last token only.

        r_t = -kl_coef * KL_t + score * [t is the last response token]

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
    eq. 2.

    Args:
        scores: (B,), one per response; that of a row with an empty mask does not matter.
        kl: (B, R), nats; what it holds on padding does not matter.
        mask: (B, R) bool; the last True of a row is its last response token (EOS when there is one).
        kl_coef: reward per nat.

    Returns:
        (B, R), zero on padding, so a row with an empty mask has no reward anywhere.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(mask, kl=kl)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, must be {tuple(mask.shape[:1])}: one per response.")
    num_trues_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    is_last = mask & (num_trues_from_here == 1)
    score_at_last = scores[:, None].expand_as(kl).masked_fill(~is_last, 0)
    return score_at_last - kl_coef * kl.masked_fill(~mask, 0)
