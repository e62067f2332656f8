"""A model's linear layers, with their products left to `engine.algorithms.matrix_products`."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.algorithms.matrix_products import ONEDNN_IS_FASTER, SMALLEST, linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class TransposedLinear(Conv1D):
    """transformers' `Conv1D` of GPT-2, to rounding: its weight is (inputs, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, transposed=True)


TAKES_THE_PLACE_OF = {nn.Linear: Linear, Conv1D: TransposedLinear}


def use_fast_products(model: nn.Module) -> None:
    """Let the model's large linear layers compute as `linear` does, in place; the same parameters under the same names.
    Does nothing where `linear` would do what torch does, nor where there is an accelerator. Layers of other kinds that
    hold linear ones inside (adapters) gain with them; those that are linear in a way of their own (of 4 bits) stay.
    """
    if not ONEDNN_IS_FASTER or torch.accelerator.is_available():
        return
    for module in model.modules():
        if type(module) in TAKES_THE_PLACE_OF and _entries(module) >= SMALLEST:
            module.__class__ = TAKES_THE_PLACE_OF[type(module)]


def _entries(layer: nn.Linear | Conv1D) -> int:
    """Of its weight, which under ZeRO-3 may be empty right now."""
    return layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
