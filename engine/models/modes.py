"""Training mode, eval mode, and activations that are kept or computed again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """For the length of the block. A module that is in eval mode already is not walked through: with hundreds of
    submodules, as adapters have, that costs more than a small model's forward pass.
    """
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


def checkpoint_activations(module: nn.Module) -> None:
    """Keep a layer's input only, and compute the layer again in the backward pass.

    Args:
        module: a wrapper; its `.model` is the transformers model.
    """
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
