"""Training mode and eval mode."""

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
