"""A model's linear layers, with their products left to `engine.algorithms.matrix_products`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.algorithms.matrix_products import (
    ONEDNN_IS_FASTER,
    SMALLEST,
    linear,
    low_rank_linear,
    packed,
    product_with_packed,
)


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


class LowRankLinear(nn.Linear):
    """`torch.nn.Linear`, to rounding, for an adapter's two products."""

    def forward(self, input: Tensor) -> Tensor:
        return low_rank_linear(input, self.weight)


class AdaptedLinear(lora.Linear):
    """PEFT 0.21's layer around one of those above, in fp32, to rounding."""

    packed: Tensor | None = None  # with the adapters merged
    packed_adapters: list[str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters or not self.is_plain:
            return super().forward(x)
        if self.packed is not None and self.packed_adapters == self.active_adapters:
            return product_with_packed(x, self.packed, self.base_layer.bias)
        said = self.base_layer(x)
        for name in self._adapters():
            narrow = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]  # scaled where it is narrow
            said = said + self.lora_B[name](narrow)
        return said

    @property
    def is_plain(self) -> bool:
        """W x + s B A x, and none of PEFT's other kinds."""
        return not (self.merged or self.lora_variant or any(self.lora_bias.values()))

    @torch.no_grad()
    def pack(self) -> None:
        changes = [self.get_delta_weight(name) for name in self._adapters()]
        whole = sum(changes, start=self.base_layer.weight)
        self.packed = packed(whole.t() if isinstance(self.base_layer, TransposedLinear) else whole)
        self.packed_adapters = list(self.active_adapters)

    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]


TAKES_THE_PLACE_OF = {nn.Linear: Linear, Conv1D: TransposedLinear}
FAST = tuple(TAKES_THE_PLACE_OF.values())
Packable = Linear | TransposedLinear | AdaptedLinear


# An iteration of the benchmark's with responses of one length takes some 80.
REMEMBERED_KERNELS = 128


def use_fast_products(model: nn.Module) -> None:
    """Let the model's large linear layers compute as `linear` does, in place, and adapters around such layers with
    them; the same parameters under the same names. Does nothing where `linear` would do what torch does, nor where
    there is an accelerator. Layers that are linear in a way of their own (of 4 bits) stay.
    """
    if torch.accelerator.is_available():
        return
    _remember_few_kernels()
    if not ONEDNN_IS_FASTER:
        return
    for module in model.modules():
        if type(module) in TAKES_THE_PLACE_OF and _entries(module) >= SMALLEST:
            module.__class__ = TAKES_THE_PLACE_OF[type(module)]
    for module in model.modules():
        if type(module) in (lora.Linear, AdaptedLinear) and isinstance(module.base_layer, FAST):
            _use_fast_adapter(module)


def _use_fast_adapter(layer: lora.Linear) -> None:
    parts = [*layer.lora_A.values(), *layer.lora_B.values()]
    if {part.weight.dtype for part in (layer.base_layer, *parts)} != {torch.float32}:
        return
    layer.__class__ = AdaptedLinear
    for part in parts:
        if part.bias is None:
            part.__class__ = LowRankLinear


def _remember_few_kernels() -> None:
    """Let oneDNN keep its latest 128 kernels, where by itself it keeps 1024 in each of two caches: every number of rows
    makes new ones, of 0.6 MiB, and responses of all lengths fill a rank's memory with them, iteration after iteration.
    Too late after oneDNN's first product in this process. A user who has set one of the variables keeps both.
    """
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch's way to it
    if not any(name in os.environ for name in names):
        os.environ |= dict.fromkeys(names, str(REMEMBERED_KERNELS))


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """The layers of `use_fast_products` with packed copies of their weights, adapters merged, for the length of the
    block, which neither trains the model nor changes its weights; the weights have to be whole. Takes as much memory
    again.
    """
    layers = [layer for layer in _packable(model) if _base(layer).weight.dtype == torch.float32]
    try:
        for layer in layers:
            layer.pack()
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _packable(module: nn.Module) -> Iterator[Packable]:
    """An adapted layer is one of them, and then what it holds is not."""
    if isinstance(module, Packable) and not (isinstance(module, AdaptedLinear) and not module.is_plain):
        yield module
        return
    for child in module.children():
        yield from _packable(child)


def _base(layer: Packable) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdaptedLinear) else layer


def _entries(layer: nn.Linear | Conv1D) -> int:
    """Of its weight, which under ZeRO-3 may be empty right now."""
    return layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
