"""Masks from lengths, and sums over what a mask counts. True = counts, everywhere."""

import torch
from torch import Tensor

# Inside the square root, so that a batch of equal values gives zeros and not 0 / 0.
WHITEN_EPS = 1e-8


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse, by name, a tensor whose shape is not the mask's (torch would broadcast it in silence).

    Args:
        mask: bool, any shape.
        tensors: each must have the mask's shape.

    Raises:
        ValueError: a shape differs, or the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, must be torch.bool (True = counts). Pass mask.bool().")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, mask has {tuple(mask.shape)}: they must be equal."
            )


def response_mask(lengths: Tensor, max_length: int) -> Tensor:
    """True for the first `lengths[i]` columns of row i.

    Made from lengths and never from the pad id: with pad == eos the latter would drop EOS from the loss.

    Args:
        lengths: (B,) integer, in tokens, each in 0..max_length.
        max_length: R, the number of columns.

    Returns:
        (B, R) bool; each row is Trues followed by Falses.

    Raises:
        ValueError: lengths is not 1-D, or a length lies outside 0..max_length.
    """
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, must be (B,).")
    if lengths.numel() and (lengths.min() < 0 or lengths.max() > max_length):
        raise ValueError(
            f"lengths run from {lengths.min()} to {lengths.max()}, must lie in 0..max_length={max_length}."
        )
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is True.

    Args:
        x: any shape; what it holds where mask is False does not matter, NaN and inf included, nor for the gradient.
        mask: bool, the shape of x.

    Returns:
        scalar, 0 for an all-False mask.

    Raises:
        ValueError: shapes differ.
    """
    check_shapes(mask, x=x)
    return x.masked_fill(~mask, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over all True entries together: not a mean of row means, so every token weighs the same.

    Args:
        x: any shape; what it holds where mask is False does not matter, NaN and inf included, nor for the gradient.
        mask: bool, the shape of x.

    Returns:
        scalar, 0 (never NaN) for an all-False mask.

    Raises:
        ValueError: shapes differ.
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to zero mean and unit variance over all True entries.

        (x - mean) / sqrt(var + WHITEN_EPS)        var: population variance (divided by n, not n - 1)

    Andrychowicz et al. 2021, https://arxiv.org/abs/2006.05990, section B.9 (advantage normalisation).

    Args:
        x: any shape, floating point: the global batch, all ranks together; False entries do not matter.
        mask: bool, the shape of x.

    Returns:
        the shape of x, unitless, zero where mask is False; finite also for one entry, none, or equal ones.

    Raises:
        ValueError: shapes differ.
    """
    centred = (x - masked_mean(x, mask)).masked_fill(~mask, 0)
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + WHITEN_EPS)
