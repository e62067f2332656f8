"""logprobs.py: the chunked functions against the full log-softmax, in value, gradient and memory."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine.algorithms.kl import full_kl
from engine.algorithms.logprobs import (
    chunked_full_kl,
    chunked_full_kl_sum,
    chunked_token_logprobs,
    chunked_token_logprobs_and_entropy,
    entropy,
    token_logprobs,
)

N, V, H = 10, 13, 6
CHUNKS = [1, 3, 7, N, N + 5]


def inputs(seed=0, dtype=torch.float32, n=N, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_() if with_bias else None
    tokens = torch.randint(V, (n,), generator=generator)
    grad = torch.randn(n, generator=generator)
    return hidden, weight, bias, tokens, grad


def gradients(output, grad, *leaves):
    return torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad.to(output.dtype))


class LargestFloat(TorchDispatchMode):
    """The most elements of any floating tensor that an operation returned; `exempt` shapes do not count."""

    def __init__(self, *exempt):
        super().__init__()
        self.exempt = exempt
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and tuple(x.shape) not in self.exempt:
                self.largest = max(self.largest, x.numel())
        return result


class AliveTogether(TorchDispatchMode):
    """How many pieces of memory for so many floating numbers there were at the same time."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.most, self.seen = numbers, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() == self.numbers:
                self.seen.append(weakref.ref(x))
        alive = [x for reference in self.seen if (x := reference()) is not None]
        self.most = max(self.most, len({x.untyped_storage().data_ptr() for x in alive}))
        return result


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    logprobs = token_logprobs(logits, torch.tensor([[1, 0]]), temperature=1.0)
    assert logprobs.tolist() == [[pytest.approx(math.log(0.75)), pytest.approx(math.log(0.5))]]
    # Temperature 1/2 squares the odds: 9 : 1.
    logprobs = token_logprobs(logits, torch.tensor([[1, 0]]), temperature=0.5)
    assert logprobs[0, 0].item() == pytest.approx(math.log(0.9))


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2000.0, -2000.0]])
    assert entropy(logits, temperature=0.7).tolist() == [pytest.approx(math.log(4)), pytest.approx(math.log(2))]
    two = torch.tensor([0.0, math.log(3.0)])
    assert entropy(two, temperature=0.5).item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def test_bf16_logits_are_softmaxed_in_fp32():
    logits, tokens = torch.randn(4, 9).bfloat16(), torch.tensor([0, 3, 8, 1])
    for actual, expected in [
        (token_logprobs(logits, tokens, temperature=0.7), token_logprobs(logits.float(), tokens, temperature=0.7)),
        (entropy(logits, temperature=0.7), entropy(logits.float(), temperature=0.7)),
    ]:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected)


def test_gradients_in_float64():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=0.7), logits)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 1.7]))
def test_chunked_equals_full(chunk_tokens, with_bias, seed, temperature):
    hidden, weight, bias, tokens, grad = inputs(seed, with_bias=with_bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = token_logprobs(logits, tokens, temperature=temperature)
    scalars = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    actual = chunked_token_logprobs(hidden, weight, bias, tokens, **scalars)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    leaves = (hidden, weight, bias)
    for a, e in zip(gradients(actual, grad, *leaves), gradients(expected, grad, *leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logprobs, entropies = chunked_token_logprobs_and_entropy(hidden, weight, bias, tokens, **scalars)
    assert torch.equal(logprobs, actual)
    torch.testing.assert_close(entropies, entropy(logits, temperature=temperature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_chunked_full_kl_equals_full_kl(chunk_tokens, temperature):
    hidden, weight, bias, *_ = inputs(1)
    ref_hidden, ref_weight = torch.randn(N, H + 2), torch.randn(V, H + 2)
    kl = chunked_full_kl(
        hidden, weight, bias, ref_hidden, ref_weight, None, temperature=temperature, chunk_tokens=chunk_tokens
    )
    assert not kl.requires_grad
    expected = full_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T, temperature=temperature)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 20])
def test_chunked_gradcheck_in_float64(chunk_tokens):
    hidden, weight, bias, tokens, _ = inputs(2, dtype=torch.float64, n=5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_token_logprobs(h, w, b, tokens, temperature=0.7, chunk_tokens=chunk_tokens),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 16])
def test_nothing_larger_than_a_chunk_of_logits(dtype, chunk_tokens):
    n, vocabulary, width = 64, 512, 5
    hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    tokens = torch.randint(vocabulary, (n,))
    scalars = {"temperature": 0.7, "chunk_tokens": chunk_tokens}
    with LargestFloat((vocabulary, width), (width, vocabulary)) as memory:
        chunked_token_logprobs(hidden, weight, bias, tokens, **scalars).sum().backward()
        chunked_token_logprobs_and_entropy(hidden, weight, bias, tokens, **scalars)[1].sum().backward()
        chunked_full_kl(hidden, weight, bias, hidden, weight, bias, **scalars)
    assert memory.largest == chunk_tokens * vocabulary
    with LargestFloat((vocabulary, width), (width, vocabulary)) as memory:
        token_logprobs(hidden @ weight.T, tokens, temperature=0.7).sum().backward()
    assert memory.largest == n * vocabulary


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_unneeded_gradients_are_not_computed(frozen):
    leaves = dict(zip(("hidden", "weight", "bias"), inputs()[:3], strict=True))
    tokens, grad = inputs()[3:]
    full = gradients(
        chunked_token_logprobs(**leaves, tokens=tokens, temperature=0.7, chunk_tokens=4), grad, *leaves.values()
    )
    expected = dict(zip(leaves, full, strict=True))
    del expected[frozen]
    leaves[frozen].requires_grad_(False)
    trained = [leaf for name, leaf in leaves.items() if name != frozen]
    output = chunked_token_logprobs(**leaves, tokens=tokens, temperature=0.7, chunk_tokens=4)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "aten.t." not in str(func) and "detach" not in str(func):
                shapes.append(tuple(result.shape))
            return result

    with Shapes():
        actual = gradients(output, grad, *trained)
    for a, e in zip(actual, expected.values(), strict=True):
        torch.testing.assert_close(a, e)
    # rows of 4, 4 and 2: (rows, H) is a piece of hidden's gradient before it is copied into place.
    assert tuple(leaves[frozen].shape) not in shapes


def test_weight_may_be_emptied_between_forward_and_backward():
    hidden, weight, bias, tokens, grad = inputs()
    expected = gradients(
        chunked_token_logprobs(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=4),
        grad,
        hidden,
        weight,
        bias,
    )
    output = chunked_token_logprobs(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=4)
    kept = [p.data.clone() for p in (weight, bias)]
    for p in (weight, bias):
        p.data.fill_(math.nan)
        p.data = torch.empty(0)
    for p, data in zip((weight, bias), kept, strict=True):
        p.data = data
    for a, e in zip(gradients(output, grad, hidden, weight, bias), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("chunk_tokens", [3, 64])
def test_bf16(chunk_tokens):
    hidden, weight, bias, tokens, grad = inputs(dtype=torch.bfloat16)
    actual = chunked_token_logprobs(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=chunk_tokens)
    assert actual.dtype == torch.float32
    # The bf16 product itself, softmaxed in fp32: the only rounding there may be in forward.
    expected = token_logprobs(torch.nn.functional.linear(hidden, weight, bias), tokens, temperature=0.7)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    leaves = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    reference = token_logprobs(torch.nn.functional.linear(*leaves), tokens, temperature=0.7)
    for a, e in zip(gradients(actual, grad, hidden, weight, bias), gradients(reference, grad, *leaves), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), e, rtol=0.05, atol=0.1)


def test_bf16_weight_gradient_is_summed_in_fp32():
    # 1 + 512 * 2^-10 in bf16 stays at 1 (2^-10 is below half an ulp of 1); in fp32 it is 1.5.
    hidden = torch.full((513, 1), 2**-10, dtype=torch.bfloat16)
    hidden[0] = 1.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(513, dtype=torch.int64)
    output = chunked_token_logprobs(hidden, weight, None, tokens, temperature=1.0, chunk_tokens=1)
    output.backward(torch.full((513,), 2.0))  # d logprob / d logit_0 = 1/2
    assert weight.grad.tolist() == [[1.5], [-1.5]]


def test_no_tokens():
    hidden, weight, bias, tokens, grad = inputs(n=0)
    output = chunked_token_logprobs(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=4)
    assert output.shape == (0,)
    for leaf, g in zip((hidden, weight, bias), gradients(output, grad, hidden, weight, bias), strict=True):
        assert torch.equal(g, torch.zeros_like(leaf))
    for x in chunked_token_logprobs_and_entropy(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=4):
        assert x.shape == (0,)
    kl = chunked_full_kl(hidden, weight, bias, hidden, weight, bias, temperature=0.7, chunk_tokens=4)
    assert kl.shape == (0,)


@pytest.mark.parametrize("chunk_tokens", [8, 32, 64])
def test_one_chunk_of_logits_is_alive_at_a_time(chunk_tokens):
    hidden, weight = (torch.randn(rows, 5, requires_grad=True) for rows in (64, 512))
    given = dict(tokens=torch.zeros(64, dtype=torch.int64), temperature=0.7, chunk_tokens=chunk_tokens)
    with AliveTogether(chunk_tokens * 512) as memory:
        chunked_token_logprobs(hidden, weight, None, **given).sum().backward()
    assert memory.most == 1
    with AliveTogether(chunk_tokens * 512) as memory:  # the gradient of the entropy takes its factor, made of two
        sum(x.sum() for x in chunked_token_logprobs_and_entropy(hidden, weight, None, **given)).backward()
    assert memory.most == 3


@pytest.mark.parametrize(("chunk_tokens", "products"), [(64, 3), (32, 4)], ids=["one chunk", "two chunks"])
def test_a_single_chunk_is_projected_to_the_vocabulary_once(chunk_tokens, products):
    """Logits, gradient of the states, gradient of the weight; and logits again where no chunk could be kept."""
    n, vocabulary, width = 64, 128, 16
    hidden, weight = (torch.randn(rows, width, requires_grad=True) for rows in (n, vocabulary))
    in_place = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * one[0] * one[1] * other[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        chunked_token_logprobs(
            hidden, weight, None, torch.zeros(n, dtype=torch.int64), temperature=1.0, chunk_tokens=chunk_tokens
        ).sum().backward()
    assert counter.get_total_flops() == products * 2 * n * vocabulary * width


def test_a_second_backward_pass_finds_the_chunk_gone_and_makes_another():
    hidden, weight, bias, tokens, grad = inputs()
    logprobs = chunked_token_logprobs(hidden, weight, bias, tokens, temperature=0.7, chunk_tokens=N)
    leaves = (hidden, weight, bias)
    once, again = (torch.autograd.grad(logprobs, leaves, grad, retain_graph=True) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_refusals():
    hidden, weight, bias, tokens, _ = inputs()
    for function in (chunked_token_logprobs, chunked_token_logprobs_and_entropy):
        with pytest.raises(ValueError, match="tokens has shape"):
            function(hidden, weight, bias, tokens[1:], temperature=1.0, chunk_tokens=4)
        with pytest.raises(ValueError, match="hidden has shape"):
            function(hidden[None], weight, bias, tokens, temperature=1.0, chunk_tokens=4)
        with pytest.raises(ValueError, match="temperature=0"):
            function(hidden, weight, bias, tokens, temperature=0, chunk_tokens=4)
        with pytest.raises(ValueError, match="chunk_tokens=0"):
            function(hidden, weight, bias, tokens, temperature=1.0, chunk_tokens=0)
    with pytest.raises(ValueError, match="ref_hidden"):
        chunked_full_kl(hidden, weight, bias, hidden[1:], weight, bias, temperature=1.0, chunk_tokens=4)
    with pytest.raises(ValueError, match="tokens has shape"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), temperature=1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        entropy(torch.zeros(2, 3), temperature=0)


# Terms of a loss: the entropy bonus, the full KL


def heads(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11, 5), (11,), (7, 3), (11, 3), (11,), (7,)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_entropies_and_their_gradients_are_those_of_the_whole_logits(chunk_tokens, with_bias):
    hidden, weight, bias, *_, weights = heads()
    tokens = torch.arange(7)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, *([bias] if with_bias else []))]
    given = dict(temperature=0.7, chunk_tokens=chunk_tokens)
    logprobs, entropies = chunked_token_logprobs_and_entropy(
        hidden, weight, bias if with_bias else None, tokens, **given
    )
    found = torch.autograd.grad((logprobs * weights + 3 * entropies * weights).sum(), inputs)
    log_p = ((hidden @ weight.T + (bias if with_bias else 0)) / 0.7).log_softmax(-1)
    plain, plain_entropies = log_p[torch.arange(7), tokens], -(log_p.exp() * log_p).sum(-1)
    wanted = torch.autograd.grad((plain * weights + 3 * plain_entropies * weights).sum(), inputs)
    torch.testing.assert_close((logprobs, entropies), (plain, plain_entropies))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_the_full_kl_as_a_loss_and_its_gradients_are_those_of_the_whole_logits(chunk_tokens):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, weights = heads()
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    ref = [tensor.requires_grad_() for tensor in (ref_hidden, ref_weight, ref_bias)]
    total = chunked_full_kl_sum(*inputs, *ref, weights, temperature=0.7, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(2 * total, [*inputs, *ref], allow_unused=True)
    kl = full_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias, temperature=0.7)
    wanted = torch.autograd.grad(2 * (kl * weights).sum(), inputs)
    torch.testing.assert_close(total, (kl * weights).sum())
    torch.testing.assert_close(found[:3], wanted)
    assert found[3:] == (None, None, None), "the ref is not trained"
