"""matrix_products.py: torch's own products to rounding, by oneDNN where it is faster and by nothing else elsewhere."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from engine.algorithms import matrix_products
from engine.algorithms.matrix_products import SMALLEST, input_gradient, linear, low_rank_linear, weight_gradient

OP = "mkldnn::_linear_pointwise"
SIZES = {"large": (384, 512), "as large as it takes": (256, 512), "small": (256, 511)}  # outputs, inputs
ROWS = {"2-d": (7,), "3-d": (2, 5), "one row": (1,), "one row of many": (1, 1)}


@pytest.fixture(params=["by oneDNN", "plain"])
def onednn(request, monkeypatch):
    """Whether oneDNN takes large products, on whatever processor this is."""
    by_onednn = request.param == "by oneDNN"
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch is without oneDNN")
    monkeypatch.setattr(matrix_products, "ONEDNN_IS_FASTER", by_onednn)
    return by_onednn


@pytest.fixture
def always_onednn(monkeypatch):
    """As on an AMD processor with AVX-512."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch is without oneDNN")
    monkeypatch.setattr(matrix_products, "ONEDNN_IS_FASTER", True)


def inputs(size="large", rows="2-d", *, dtype=torch.float32, with_bias=True, transposed=False, strided=False):
    """x, weight, bias, and a gradient of the output."""
    outputs, width = SIZES[size]
    lead = ROWS[rows]
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    def laid_out(*shape):
        return drawn(*shape, 2)[..., 0] if strided else drawn(*shape)

    x = laid_out(*lead, width)
    weight = drawn(width, outputs) if transposed else drawn(outputs, width)
    bias = laid_out(outputs) if with_bias else None
    return *(leaf if leaf is None else leaf.requires_grad_() for leaf in (x, weight, bias)), drawn(*lead, outputs)


def plain(x, weight, bias, transposed=False):
    return F.linear(x, weight.t() if transposed else weight, bias)


def with_gradients(function, x, weight, bias, grad, **given):
    """The output, then the gradients of what there is of x, weight and bias."""
    output = function(x, weight, bias, **given)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    return output, *torch.autograd.grad(output, leaves, grad)


def assert_close(actual, exact):
    """To fp32's rounding, relative to the largest; `exact` is in fp64."""
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def ops_of(call, *args, **given):
    """The names of the operators that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call(*args, **given)
    return {event.name for event in seen.events()}


# Value and gradients


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_torchs_linear_in_value_and_gradients(onednn, size, rows, with_bias, transposed, strided):
    given = inputs(size, rows, with_bias=with_bias, transposed=transposed, strided=strided)
    assert given[0].is_contiguous() != strided
    in_fp64 = [tensor if tensor is None else tensor.detach().double() for tensor in given]
    in_fp64 = [tensor if tensor is None else tensor.requires_grad_() for tensor in in_fp64]
    exact = with_gradients(plain, *in_fp64, transposed=transposed)
    actual = with_gradients(linear, *given, transposed=transposed)
    assert len(actual) == 3 + with_bias
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e)
    with torch.no_grad():
        assert torch.equal(linear(*given[:3], transposed=transposed), actual[0]), "the same without gradients"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_where_onednn_is_no_faster_every_bit_is_torchs(monkeypatch, size, transposed):
    monkeypatch.setattr(matrix_products, "ONEDNN_IS_FASTER", False)
    given = inputs(size, "3-d", transposed=transposed)
    actual = with_gradients(linear, *given, transposed=transposed)
    for a, e in zip(actual, with_gradients(plain, *given, transposed=transposed), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(onednn, frozen):
    *leaves, grad = inputs()
    full = with_gradients(linear, *leaves, grad)[1:]
    index = ("x", "weight", "bias").index(frozen)
    leaves[index].requires_grad_(False)
    linear(*leaves).backward(grad)
    for number, (leaf, wanted) in enumerate(zip(leaves, full, strict=True)):
        assert leaf.grad is None if number == index else torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_of_a_frozen_weight_the_input_is_not_kept(always_onednn, frozen):
    """As in torch's own: a model whose layers are mostly frozen takes no more memory."""
    x, weight, bias, _ = inputs()
    weight.requires_grad_(not frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda nothing: nothing):
        linear(x, weight, bias)
    assert (x.shape in kept) != frozen and weight.shape in kept


def test_a_frozen_weight_saves_its_product(always_onednn):
    """Of the two products of a backward pass: by oneDNN there is one call less for each."""
    calls = {}
    for frozen in (None, "x", "weight"):
        *leaves, grad = inputs()
        for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True):
            leaf.requires_grad_(name != frozen)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            linear(*leaves).backward(grad)
        calls[frozen] = sum(event.name == OP for event in seen.events())
    assert calls == {None: 3, "x": 2, "weight": 2}


def test_nothing_requires_grad_nothing_is_recorded(onednn):
    x, weight, bias, _ = (leaf.detach() for leaf in inputs())
    assert not linear(x, weight, bias).requires_grad
    assert linear(x.requires_grad_(), weight, bias).requires_grad
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_may_be_emptied_between_forward_and_backward(always_onednn, transposed):
    """As ZeRO-3 does to it."""
    *leaves, grad = inputs(transposed=transposed)
    of_x, of_weight, of_bias = with_gradients(linear, *leaves, grad, transposed=transposed)[1:]
    output = linear(*leaves, transposed=transposed)
    weight, twice = leaves[1], 2 * leaves[1].data
    weight.data.fill_(torch.nan)
    weight.data = torch.empty(0)
    weight.data = twice  # so that it shows which one is read
    for a, e in zip(torch.autograd.grad(output, leaves, grad), (2 * of_x, of_weight, of_bias), strict=True):
        assert torch.equal(a, e)


# The three products of a backward pass, one by one


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_the_plain_products(onednn, size):
    x, weight, _, grad = (tensor.detach() for tensor in inputs(size))
    assert_close(input_gradient(grad, weight), grad.double() @ weight.double())
    assert_close(weight_gradient(grad, x), grad.double().t() @ x.double())
    cube = grad.expand(3, *grad.shape)
    assert_close(input_gradient(cube, weight), cube.double() @ weight.double())


# Which of the two libraries computes


@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_takes_large_products_and_no_small_ones(always_onednn, transposed):
    taken = {}
    for size, (outputs, width) in SIZES.items():
        assert (outputs * width >= SMALLEST) == (size != "small")
        given = inputs(size, transposed=transposed)
        taken[size] = OP in ops_of(linear, *given[:3], transposed=transposed)
        assert taken[size] == (OP in ops_of(with_gradients, linear, *given, transposed=transposed))
    assert taken == {"large": True, "as large as it takes": True, "small": False}


@pytest.mark.skipif(not matrix_products.ONEDNN_IS_FASTER, reason="MKL is no slower on this processor")
def test_on_this_processor_it_is_used():
    assert OP in ops_of(linear, *inputs()[:3])


def test_where_onednn_is_no_faster_it_is_not_used(monkeypatch):
    monkeypatch.setattr(matrix_products, "ONEDNN_IS_FASTER", False)
    assert OP not in ops_of(with_gradients, linear, *inputs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_the_plain_way(always_onednn, dtype):
    given = inputs(dtype=dtype)
    assert OP not in ops_of(with_gradients, linear, *given)
    for a, e in zip(with_gradients(linear, *given), with_gradients(plain, *given), strict=True):
        assert a.dtype == dtype and torch.equal(a, e)


def test_autocast_goes_the_plain_way(always_onednn):
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OP not in ops_of(linear, *given[:3])
        actual, expected = linear(*given[:3]), plain(*given[:3])
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_zero_rows_go_the_plain_way(always_onednn, lead):
    _, weight, bias, _ = inputs()
    x, grad = (torch.empty(*lead, width) for width in (weight.shape[1], weight.shape[0]))
    x.requires_grad_()
    assert OP not in ops_of(linear, x, weight, bias)
    actual = with_gradients(linear, x, weight, bias, grad)
    for a, e in zip(actual, with_gradients(plain, x, weight, bias, grad), strict=True):
        assert torch.equal(a, e)
    rows = x.detach().reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    assert torch.equal(weight_gradient(rows[1], rows[0]), torch.zeros_like(weight))


AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "mkl", "mkldnn", "faster"),
    [
        (AMD, "AVX512", True, True, True),
        (INTEL, "AVX512", True, True, False),
        (AMD, "AVX2", True, True, False),
        (AMD, "AVX512", False, True, False),  # torch takes another library by itself
        (AMD, "AVX512", True, False, False),
        (None, "AVX512", True, True, False),  # no Linux
    ],
)
def test_onednn_is_faster_on_amd_with_avx512(monkeypatch, cpuinfo, capability, mkl, mkldnn, faster):
    monkeypatch.setattr(Path, "exists", lambda path: cpuinfo is not None)
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert matrix_products._onednn_is_faster() is faster


# Of low rank

LOW_RANK = {"down": (8, 512), "up": (512, 8), "to one": (1, 512), "from one": (512, 1)}  # outputs, inputs


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rows", [(64,), (2, 40), (63,), (3, 4)], ids=str)
@pytest.mark.parametrize("way", LOW_RANK)
def test_a_product_of_low_rank_is_torchs_in_value_and_gradients(onednn, way, rows, strided):
    outputs, width = LOW_RANK[way]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, width, 2, generator=rng)[..., 0]
    x = (x if strided else x.contiguous()).requires_grad_()
    weight, grad = (
        torch.randn(outputs, width, generator=rng).requires_grad_(),
        torch.randn(*rows, outputs, generator=rng),
    )
    exact_x, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    exact = with_gradients(plain, exact_x, exact_weight, None, grad.double())
    actual = with_gradients(lambda x, weight, bias: low_rank_linear(x, weight), x, weight, None, grad)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e)
    with torch.no_grad():
        assert torch.equal(low_rank_linear(x, weight), actual[0]), "the same without gradients"


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("way", LOW_RANK)
def test_of_low_rank_what_is_frozen_gets_no_gradient(onednn, way, frozen):
    """And the other the right one, of a sum too, whose gradient has strides of 0."""
    outputs, width = LOW_RANK[way]
    rng = torch.Generator().manual_seed(0)
    leaves = dict(x=torch.randn(80, width, generator=rng), weight=torch.randn(outputs, width, generator=rng))
    trained = leaves["weight" if frozen == "x" else "x"].requires_grad_()
    low_rank_linear(**leaves).sum().backward()
    of_x, of_weight = leaves["weight"].double().sum(0).expand(80, -1), leaves["x"].double().sum(0).expand(outputs, -1)
    assert leaves[frozen].grad is None
    assert_close(trained.grad, (of_weight if frozen == "x" else of_x).detach())


def test_of_low_rank_only_many_rows_in_fp32_go_to_onednn(always_onednn):
    for rows, dtype, by_onednn in ((64, torch.float32, True), (63, torch.float32, False), (64, torch.float64, False)):
        x, weight = torch.ones(rows, 512, dtype=dtype), torch.ones(8, 512, dtype=dtype)
        assert (OP in ops_of(low_rank_linear, x, weight)) == by_onednn
