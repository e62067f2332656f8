"""A model's linear layers, with their products left to `engine.algorithms.matrix_products`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.algorithms.matrix_products import ONEDNN_IS_FASTER, SMALLEST, linear, packed, product_with_packed


class Linear(nn.Linear):
    """`torch.nn.Linear`, to rounding."""

    packed: Tensor | None = None  # set by `packed_weights`

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None:
            return product_with_packed(input, self.packed, self.bias)
        return linear(input, self.weight, self.bias)

    def pack(self) -> None:
        self.packed = packed(self.weight)


class TransposedLinear(Conv1D):
    """transformers' `Conv1D` of GPT-2, to rounding: its weight is (inputs, outputs)."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return product_with_packed(x, self.packed, self.bias)
        return linear(x, self.weight, self.bias, transposed=True)

    def pack(self) -> None:
        self.packed = packed(self.weight.t())


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


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """The layers of `use_fast_products` with packed copies of their weights for the length of the block, which neither
    trains the model nor changes its weights; the weights have to be whole. Takes as much memory again.
    """
    layers = [module for module in model.modules() if isinstance(module, tuple(TAKES_THE_PLACE_OF.values()))]
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
    try:
        for layer in layers:
            layer.pack()
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _entries(layer: nn.Linear | Conv1D) -> int:
    """Of its weight, which under ZeRO-3 may be empty right now."""
    return layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
