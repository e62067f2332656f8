"""The floating-point operations a PPO iteration needs, without padding: what `floor_ratio` divides by.

A multiply and an add are two operations. Counted are matrix products: weights (looking up an embedding is free, and the
vocabulary projection counts where a response token is predicted only) and attention, causal. The backward pass takes
twice the forward's. Not counted, so that a floor_ratio of 1.0 is out of reach: norms, activation functions, the softmax
over the vocabulary, sampling, the optimizer, and whatever ranks tell each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workload import Workload


def backbone_weights(workload: Workload) -> int:
    """Elements of the matrices that every token is multiplied with: four in attention, and the MLP's, as large in both
    architectures.
    """
    hidden, kv = workload.hidden_size, workload.hidden_size * workload.num_kv_heads // workload.num_heads
    return workload.num_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * workload.intermediate_size)


def forward_operations(workload: Workload, lengths: Sequence[int], projected: int) -> float:
    """One forward pass over sequences of these lengths, with `projected` states projected to the vocabulary.

    Token t attends to t tokens, length^2 / 2 pairs a sequence and layer; a pair costs 2 hidden for the score and
    2 hidden for the sum.
    """
    matrices = 2 * backbone_weights(workload) * sum(lengths)
    pairs = sum(length * length / 2 for length in lengths)
    attention = 4 * workload.hidden_size * pairs * workload.num_layers
    vocabulary = 2 * workload.hidden_size * workload.vocab_size * projected
    return matrices + attention + vocabulary


def generate_operations(workload: Workload, lengths: Sequence[int], response_tokens: int) -> float:
    """Every token once through the actor, as a key-value cache allows; the vocabulary once per response token."""
    return forward_operations(workload, lengths, response_tokens)


def score_operations(workload: Workload, lengths: Sequence[int], response_tokens: int) -> float:
    """One forward pass of the ref with the vocabulary, of critic and reward model without. The actor's log-probs are
    known from the rollout.
    """
    return forward_operations(workload, lengths, response_tokens) + 2 * forward_operations(workload, lengths, 0)


def train_operations(workload: Workload, lengths: Sequence[int], response_tokens: int) -> float:
    """Forward and backward of the actor with the vocabulary and of the critic without, once per epoch."""
    forward = forward_operations(workload, lengths, response_tokens) + forward_operations(workload, lengths, 0)
    return 3 * workload.ppo_epochs * forward


def phase_operations(
    workload: Workload, prompt_lengths: Sequence[int], response_lengths: Sequence[int]
) -> dict[str, float]:
    """Operations of one iteration by phase, all ranks together."""
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    response_tokens = sum(response_lengths)
    return {
        "generate": generate_operations(workload, lengths, response_tokens),
        "score": score_operations(workload, lengths, response_tokens),
        "train": train_operations(workload, lengths, response_tokens),
    }
