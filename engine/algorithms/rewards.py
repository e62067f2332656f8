"""Score and KL penalty -> one reward per response token; what is done to scores before."""

from typing import NamedTuple

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


class Moments(NamedTuple):
    """Of the numbers seen so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared distances to the mean

    def with_more(self, numbers: Tensor) -> "Moments":
        """The moments of these numbers and the earlier ones together.

        Chan et al. 1983, https://doi.org/10.1080/00031305.1983.10483115, eq. 2.1.
        """
        if len(numbers) == 0:
            return self
        numbers = numbers.double()
        more, mean = len(numbers), numbers.mean().item()
        squares = (numbers - mean).square().sum().item()
        count, apart = self.count + more, mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * more / count,
            squares=self.squares + squares + apart**2 * self.count * more / count,
        )

    @property
    def std(self) -> float:
        """Of the population; 1 for numbers that do not vary."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0


def length_penalties(
    response_lengths: Tensor,
    ended: Tensor,
    *,
    missing_eos_penalty: float,
    overlong_penalty: float,
    overlong_tokens: int,
    max_response_tokens: int,
) -> Tensor:
    """What is taken off the score of a response that was cut off, or came near to it.

        missing_eos_penalty * [not ended]
        + overlong_penalty * clip((length - (max - overlong_tokens)) / overlong_tokens, 0, 1)

    The second is soft over-long punishment: Yu et al. 2025, https://arxiv.org/abs/2503.14476, eq. 13.

    Args:
        response_lengths: (B,) tokens.
        ended: (B,) bool: by an end-of-sequence token.
        overlong_tokens: over how many tokens before the longest the penalty grows; 0 for none.

    Returns:
        (B,) fp32, in units of the scores.
    """
    penalties = missing_eos_penalty * (~ended).float()
    if overlong_tokens > 0:
        beyond = response_lengths.float() - (max_response_tokens - overlong_tokens)
        penalties = penalties + overlong_penalty * (beyond / overlong_tokens).clamp(0, 1)
    return penalties
