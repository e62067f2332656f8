"""The floating-point operations a PPO iteration needs, without padding: what `floor_ratio` divides by.

A multiply and an add are two operations. Counted are matrix products: weights (looking up an embedding is free, and the
vocabulary projection counts where a response token is predicted only) and attention, causal. The backward pass takes
twice the forward's.
"""

from collections.abc import Sequence

from workload import Workload


def backbone_weights(workload: Workload) -> int:
    """Elements of the matrices that every token is multiplied with."""
    hidden, wide = workload.hidden_size, workload.intermediate_size
    return workload.num_layers * (4 * hidden * hidden + 3 * hidden * wide)


def forward_operations(workload: Workload, lengths: Sequence[int], projected: int) -> float:
    """One forward pass over sequences of these lengths, with `projected` states projected to the vocabulary.

    Token t attends to t tokens, length^2 / 2 pairs per sequence; each takes 2 hidden for the score, 2 for the sum.
    """
    matrices = 2 * backbone_weights(workload) * sum(lengths)
    attention = sum(2 * length * length * workload.hidden_size * workload.num_layers for length in lengths)
    vocabulary = 2 * workload.hidden_size * workload.vocab_size * projected
    return float(matrices + attention + vocabulary)


def phase_operations(
    workload: Workload, prompt_lengths: Sequence[int], response_lengths: Sequence[int]
) -> dict[str, float]:
    """Operations by phase, all ranks together.

    generate: every token once through the actor (a key-value cache), the vocabulary for response tokens.
    score: actor and ref with the vocabulary, critic and reward without.
    train: actor and critic, forward and backward, once per epoch.
    """
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    responses = sum(response_lengths)
    policy, scalar = forward_operations(workload, lengths, responses), forward_operations(workload, lengths, 0)
    return {
        "generate": policy,
        "score": 2 * policy + 2 * scalar,
        "train": 3 * workload.ppo_epochs * (policy + scalar),
    }
