"""Frozen weights in 4 bits: NF4 with double quantisation, by bitsandbytes.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. Heads, embeddings and norms keep the run's dtype.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

BLOCK = 64  # weights that share a scale


def quantization_config(kind: Literal["nf4"], *, dtype: torch.dtype) -> BitsAndBytesConfig:
    """For `from_pretrained`.

    Args:
        dtype: in which a weight is multiplied, once it has been unpacked.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization={kind} needs bitsandbytes, which is not installed: pip install -e '.[quantization]' "
            f"-c constraints.txt. Or leave quantization out."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def settle_quantised(model: nn.Module) -> None:
    """Hold bitsandbytes to one set of weights, and refuse those that it gets wrong.

    On a CPU that multiplies bfloat16 (AVX512-BF16), bitsandbytes 0.50 packs weights anew when they are first used in
    eval mode, rounds their scales, and does not put them back for training: a frozen model would change.

    Raises:
        ValueError: on a CPU, where bitsandbytes 0.50 takes the wrong scales for rows that end inside a block.
    """
    for name, layer in quantised_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.device.type == "cpu" and layer.in_features % BLOCK:
            raise ValueError(
                f"quantization: {name} has {layer.in_features} inputs. On a CPU bitsandbytes computes wrongly where "
                f"they are no multiple of {BLOCK}; leave quantization out, or run on a GPU."
            )


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose weights have 4 bits, with their names."""
    for name, module in model.named_modules():
        if is_quantised(getattr(module, "weight", None)):
            yield name, module


def is_quantised(weight: nn.Parameter | None) -> bool:
    """Whether a weight has been packed into 4 bits."""
    return hasattr(weight, "quant_state")


def keeps_transposed(layer: nn.Module) -> bool:
    """Whether the model keeps this layer's weight as (inputs, outputs), as GPT-2 does; bitsandbytes turns it round."""
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def unpacked(weight: nn.Parameter, *, layer: nn.Module) -> Tensor:
    """A weight as its layer computes with it, in the shape that it was loaded in: itself if it is not quantised."""
    if not is_quantised(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole = dequantize_4bit(weight.detach(), weight.quant_state)
    return whole.T.contiguous() if keeps_transposed(layer) else whole
