"""What one rollout leaves behind for PPO to train on."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from engine.algorithms.advantages import gae, monte_carlo, temporal_difference
from engine.algorithms.group_advantages import critic_free_advantages
from engine.algorithms.masking import response_mask, whiten
from engine.algorithms.rewards import kl_shaped_rewards
from engine.data.sequences import MicroBatch, Sequences, ragged_index
from engine.rollout.measuring import Measurements

MEASURED = ("logprobs", "behaviour_logprobs", "ref_logprobs", "kl", "entropy", "values")
PER_TOKEN = (*MEASURED, "rewards", "advantages", "returns")


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The responses of one iteration, of all ranks, the same on every rank; computed once and never modified.

    B responses with N tokens in all. Per-token tensors are flat, row after row, aligned with the response: an element
    belongs to response token y_t of its row, and its value is V(prompt, y_<t), the state *before* y_t is emitted.
    In an episode of several turns y_t are the actor's own tokens, one after another: the first of a turn follows the
    last of the turn before, and its state has read what was said between.
    `padded` shows one as (B, R).
    """

    sequences: Sequences
    scores: Tensor  # (B,) of whole responses, as the sources gave them
    logprobs: Tensor  # (N,) under the actor before the iteration's first step
    behaviour_logprobs: Tensor  # (N,) of the distribution that the token was drawn from, filters applied
    ref_logprobs: Tensor  # (N,) under the ref
    kl: Tensor  # (N,) estimate of KL(actor || ref)
    entropy: Tensor  # (N,) of the actor's distribution at y_t, before top-p and top-k
    values: Tensor | None  # (N,) under the critic of the same moment; None without a critic
    rewards: Tensor  # (N,) KL penalty (unless it is in the loss), plus the score at the last token
    advantages: Tensor  # (N,)
    returns: Tensor | None  # (N,) regression targets of the critic; None without a critic
    kl_coef: float  # of the penalty, wherever it is
    left_out: Tensor  # (B,) bool: nobody could score these; they have a score of 0 and no response tokens

    def __post_init__(self):
        for name, tensor in self._per_token():
            if tensor.shape != (self.sequences.num_response_tokens,):
                raise ValueError(
                    f"Experience.{name} has shape {tuple(tensor.shape)}; the responses have "
                    f"{self.sequences.num_response_tokens} tokens. Was it sliced to the response?"
                )
        if self.scores.shape != (len(self),):
            raise ValueError(
                f"Experience.scores has shape {tuple(self.scores.shape)}; there are {len(self)} responses."
            )

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: Tensor) -> "Experience":
        tokens = ragged_index(self.sequences.response_lengths, rows)
        picked = {name: tensor[tokens] for name, tensor in self._per_token()}
        by_row = dict(sequences=self.sequences[rows], scores=self.scores[rows], left_out=self.left_out[rows])
        return replace(self, **by_row, **picked)

    @property
    def num_scored(self) -> int:
        """Responses that are learned from."""
        return int((~self.left_out).sum())

    @property
    def is_finite(self) -> bool:
        """Whether every number is. The same answer on every rank, since every rank holds the same experience."""
        return not self.not_finite

    @property
    def not_finite(self) -> str:
        """Which tensors hold NaN or inf, and in how many places; empty when none does."""
        tensors = (("scores", self.scores), *self._per_token())
        broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors}
        said = ", ".join(f"{number} of {name}" for name, number in broken.items() if number)
        return said and f"not finite: {said}"

    @property
    def broken_rows(self) -> dict[int, list[str]]:
        """Rows in which something that was scored or measured is not finite -> what it is. What is computed from it,
        over all rows together, may then be NaN everywhere.
        """
        found: dict[int, list[str]] = {int(row): ["scores"] for row in (~self.scores.isfinite()).nonzero()}
        row_of_token = torch.repeat_interleave(torch.arange(len(self)), self.sequences.response_lengths)
        for name in MEASURED:
            if (tensor := getattr(self, name)) is not None:
                for row in row_of_token[~tensor.isfinite()].unique().tolist():
                    found.setdefault(row, []).append(name)
        return found

    def of(self, batch: MicroBatch, name: str) -> Tensor:
        """(n,) one of the per-token tensors at a micro-batch's response tokens, on the micro-batch's device."""
        return getattr(self, name)[batch.response_tokens].to(batch.positions.device)

    def padded(self, name: str) -> Tensor:
        """A per-token tensor as (B, R), zero on padding."""
        return padded(getattr(self, name), self.sequences.response_lengths)

    def tensors(self) -> dict[str, Tensor]:
        """All that is in it but `kl_coef`, for a checkpoint."""
        rows = {f"sequences.{f.name}": getattr(self.sequences, f.name) for f in fields(self.sequences)}
        flat = rows | {"scores": self.scores, "left_out": self.left_out} | dict(self._per_token())
        return {name: tensor for name, tensor in flat.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], *, kl_coef: float) -> "Experience":
        """What `tensors` was made of."""
        sequences = Sequences(**{f.name: tensors.get(f"sequences.{f.name}") for f in fields(Sequences)})
        rest = {f.name: tensors.get(f.name) for f in fields(cls) if f.name not in ("sequences", "kl_coef")}
        return cls(sequences=sequences, kl_coef=kl_coef, **rest)

    def _per_token(self) -> Iterator[tuple[str, Tensor]]:
        """Those that there are."""
        for name in PER_TOKEN:
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def minibatches(self, minibatch_size: int, rng: torch.Generator) -> Iterator["Experience"]:
        """Every response exactly once, in a fresh random order."""
        for rows in torch.randperm(len(self), generator=rng).split(minibatch_size):
            yield self[rows]


def shaped_experience(
    sequences: Sequences,
    scores: Tensor,
    measured: Measurements,
    *,
    shaped_scores: Tensor | None = None,
    kl_coef: float,
    kl_placement: Literal["reward", "loss"],
    advantage_estimator: str,
    whitened: bool,
    group_size: int,
    gamma: float,
    lam: float,
    value_label: Literal["gae", "monte_carlo", "temporal_difference"],
    left_out: Tensor | None = None,
) -> Experience:
    """Rewards, advantages and returns from what was measured.

    Args:
        scores: (B,) one per response; the responses to one prompt are neighbours.
        shaped_scores: (B,) what goes into the rewards in their place: normalised, clipped, penalised.
        kl_placement: `loss` leaves the penalty out of the rewards.
        advantage_estimator: `gae`, or one that needs no critic: see `critic_free_advantages`.
        whitened: advantages are shifted and scaled over all responses together.
        group_size: responses per prompt.
        value_label: the critic's targets.
        left_out: (B,) bool; nobody could score these, and their responses have been taken off the sequences.
    """
    left_out = torch.zeros(len(scores), dtype=torch.bool) if left_out is None else left_out
    lengths = sequences.response_lengths
    mask = response_mask(lengths, int(lengths.max()))
    penalty = kl_coef if kl_placement == "reward" else 0.0
    kl = padded(measured.kl, lengths)
    shaped_scores = scores if shaped_scores is None else shaped_scores
    rewards = kl_shaped_rewards(shaped_scores, kl, mask, kl_coef=penalty)
    returns = None
    if advantage_estimator == "gae":
        values = padded(measured.values, lengths)
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        if value_label == "monte_carlo":
            returns = monte_carlo(rewards, mask, gamma=gamma)
        elif value_label == "temporal_difference":
            returns = temporal_difference(rewards, values, mask, gamma=gamma)
    else:
        given = dict(
            kl_coef=penalty, estimator=advantage_estimator, group_size=group_size, gamma=gamma, left_out=left_out
        )
        advantages = critic_free_advantages(shaped_scores, kl, mask, **given)
    if whitened:
        advantages = whiten(advantages, mask)
    return Experience(
        sequences=sequences,
        scores=scores,
        **{f.name: getattr(measured, f.name) for f in fields(measured)},
        rewards=rewards[mask],
        advantages=advantages[mask],
        returns=None if returns is None else returns[mask],
        kl_coef=kl_coef,
        left_out=left_out,
    )


def padded(flat: Tensor, lengths: Tensor) -> Tensor:
    """(N,) of rows of these lengths -> (B, R), zero on padding."""
    mask = response_mask(lengths, int(lengths.max()))
    rows = torch.zeros(mask.shape, dtype=flat.dtype)
    rows[mask] = flat
    return rows
