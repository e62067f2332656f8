"""x Wᵀ in fp32 on a CPU, by the faster of the two libraries that torch has for it.

torch takes MKL, which leaves the AVX-512 units of AMD's processors unused: 91 GFLOP/s a core of an EPYC, where oneDNN
comes to 200 (forward and both gradients, 432 rows). oneDNN has no public name in torch for plain tensors in fp32;
`torch.ops.mkldnn._linear_pointwise` is what torch's own compiler calls, and
`tests/algorithms/test_matrix_products.py` holds it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Entries of W. A call of oneDNN's costs 10 us and one of MKL's 1: below, decoding a few rows would get slower.
SMALLEST = 2**17
# Of x, where W is of low rank: 432 by 1024 to rank 8 and back take 2.3 ms by MKL with their gradients, 0.7 by oneDNN.
FEWEST_ROWS = 64


def _onednn_is_faster() -> bool:
    """Whether torch would take MKL, and this is an AMD processor with AVX-512."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    cpus = Path("/proc/cpuinfo")
    is_amd = cpus.exists() and "AuthenticAMD" in cpus.read_text()
    return libraries and is_amd and "AVX512" in torch.backends.cpu.get_cpu_capability()


ONEDNN_IS_FASTER = _onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """`torch.nn.functional.linear` to rounding; differentiable once where oneDNN computes it.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs), or (inputs, outputs) if `transposed`.
        bias: (outputs,) or None.
    """
    if not (weight.numel() >= SMALLEST and _onednn_takes(x, weight)):
        return F.linear(x, weight.t() if transposed else weight, bias)
    if torch.is_grad_enabled() and any(of is not None and of.requires_grad for of in (x, weight, bias)):
        return _OneDNNLinear.apply(x, weight, bias, transposed)
    return _onednn(x, weight.t() if transposed else weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W, (..., outputs) and (outputs, inputs) -> (..., inputs): of `linear`'s `x`. Without gradient."""
    by_onednn = weight.numel() >= SMALLEST and _onednn_takes(grad, weight)
    return _onednn(grad, weight.t()) if by_onednn else grad @ weight


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x, (n, outputs) and (n, inputs) -> (outputs, inputs): of `linear`'s `weight`. Without gradient."""
    by_onednn = grad.shape[1] * x.shape[1] >= SMALLEST and _onednn_takes(grad, x)
    return _onednn(grad.t(), x.t()) if by_onednn else grad.t() @ x


def low_rank_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` of a weight with few inputs or few outputs, such as an adapter's: the library's call is worth its cost
    from 64 rows on.
    """
    if not (x.shape[:-1].numel() >= FEWEST_ROWS and _onednn_takes(x, weight)):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDNNLowRankLinear.apply(x, weight)
    return _onednn(x, weight)


def packed(weight: Tensor) -> Tensor:
    """A copy of (outputs, inputs) that only `product_with_packed` can read: for weights that stay as they are while
    many products of few rows are taken; with 16 rows 5 ms where the plain ones take 7. The same bits from two
    rows on, to rounding for one.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)


def product_with_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradient, of a weight that is `packed`."""
    return _onednn(x, weight, bias)


def _onednn_takes(a: Tensor, b: Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and a.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias. Strides of matrices are looked at, and not those of a bias."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None if bias is None else bias.contiguous(), "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        # The parameter and no view of it: ZeRO-3 empties and refills its .data, which only the saved leaf itself sees.
        _, needs_weight, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight)
        ctx.transposed = transposed
        return _onednn(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        of_weight = None
        if needs_weight:
            x_rows = x.reshape(-1, x.shape[-1])
            of_weight = weight_gradient(x_rows, rows) if ctx.transposed else weight_gradient(rows, x_rows)
        return (
            input_gradient(grad, weight.t() if ctx.transposed else weight) if needs_x else None,
            of_weight,
            rows.sum(0) if needs_bias else None,
            None,
        )


class _OneDNNLowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight = ctx.needs_input_grad
        return _onednn(grad, weight.t()) if needs_x else None, _narrow_first(rows, x_rows) if needs_weight else None


def _narrow_first(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x, by the product whose first factor is the narrower one: oneDNN copies that one, transposed."""
    return _onednn(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else _onednn(x.t(), grad.t()).t()
