"""Models with layers that are large enough for oneDNN, and what they compute, on whatever processor this is."""

import tiny
import torch

from engine.algorithms import matrix_products
from engine.models import linear_layers
from engine.models.language_model import hidden_states, load_language_model
from engine.models.linear_layers import Linear, TransposedLinear

LARGE = {"llama": tiny.LARGE_LLAMA, "gpt2": tiny.LARGE_GPT2}
FAST = (Linear, TransposedLinear)
IDS = torch.tensor([[5, 6, 7, 200, 31, 8], [9, 100, 3, 44, 257, 12]])


def switch(patch, faster: bool) -> None:
    """As on a processor of which this is so, without a GPU."""
    patch.setattr(torch.accelerator, "is_available", lambda: False)
    patch.setattr(matrix_products, "ONEDNN_IS_FASTER", faster)
    patch.setattr(linear_layers, "ONEDNN_IS_FASTER", faster)


def loaded(name, **given):
    return load_language_model(name, dtype=torch.float32, **given)


def told(wrapper, ids=IDS):
    """What a model computes, and the gradient of every weight."""
    hidden = hidden_states(wrapper.model, ids)
    # Not a sum of squares, which the last norm has made a constant.
    hidden.mul(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).mean().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in wrapper.named_parameters()}
