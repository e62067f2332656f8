"""The phases of a PPO run, and which settings decide how much memory each takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SMALLER = {
    "generate": "--rollout.micro_batch_size, or set --rollout.weights sharded",
    "score": "--micro_batch_size or --logits_chunk_tokens, or set --rollout.weights sharded",
    "train": "--micro_batch_size or --logits_chunk_tokens, or set --actor.gradient_checkpointing true",
    "evaluate": "--rollout.micro_batch_size or --micro_batch_size, or set --rollout.weights sharded",
}


@contextmanager
def phase(name: str, iteration: int, on_phase: Callable[[str, int], None] | None) -> Iterator[None]:
    """Tell that one begins; where it runs out of memory, say which setting makes it smaller."""
    if on_phase is not None:
        on_phase(name, iteration)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"Out of memory in phase {name}: lower {SMALLER[name]}. {error}") from error
