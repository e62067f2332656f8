"""Log-probs and entropies of tokens, from logits or, in chunks of which one is held at a time, from hidden states.

The chunked functions are the hot path: at vocabulary size V the logits of N tokens are by far the largest tensor of a
language model's step. Chunked cross entropy is from Hsu et al. 2024, https://arxiv.org/abs/2410.10989; unlike there,
backward recomputes the logits of more than one chunk, since the gradient of a PPO loss is not known in forward.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from engine.algorithms.kl import full_kl
from engine.algorithms.matrix_products import input_gradient, linear, weight_gradient


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each token.

        logits_y / temperature - log sum_v exp(logits_v / temperature)

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531, eq. 1.

    Args:
        logits: (..., V); the softmax is taken in fp32 at least.
        tokens: (...), int64, each in 0..V-1.
        temperature: > 0, the one that tokens are sampled at.

    Returns:
        (...), nats, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes do not fit, or temperature <= 0.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be {tuple(logits.shape[:-1])} to fit logits.")
    return _log_softmax(logits, temperature).gather(-1, tokens[..., None]).squeeze(-1)


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Entropy of the next-token distribution.

        -sum_v p(v) log p(v)        p = softmax(logits / temperature)

    Shannon 1948, https://doi.org/10.1002/j.1538-7305.1948.tb01338.x.

    Args:
        logits: (..., V), finite; the softmax is taken in fp32 at least.
        temperature: > 0.

    Returns:
        (...), nats, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: temperature <= 0.
    """
    log_p = _log_softmax(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


def chunked_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *, temperature: float, chunk_tokens: int
) -> Tensor:
    """token_logprobs(hidden @ weight.T + bias, tokens) with at most chunk_tokens rows of logits alive, backward too.

    The matrix products run in the inputs' dtype, the softmax in fp32 at least; weight's gradient is summed over chunks
    in fp32 and then cast. Gradients that nobody needs are not computed. The weight itself is what backward reads: it
    must then hold its values again if it was emptied in between (ZeRO-3). Where N <= chunk_tokens the logits live until
    then.

    Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.2.

    Args:
        hidden: (N, H); N may be 0.
        weight: (V, H), the dtype of hidden.
        bias: (V,) or None.
        tokens: (N,), int64, each in 0..V-1.
        temperature: > 0, the one that tokens are sampled at.
        chunk_tokens: rows per chunk, >= 1.

    Returns:
        (N,), nats, fp32 (fp64 for fp64 inputs), differentiable (once) in hidden, weight and bias.

    Raises:
        ValueError: shapes do not fit, temperature <= 0 or chunk_tokens < 1.
    """
    _check_chunked(hidden, tokens, temperature, chunk_tokens)
    logprobs, _ = _ChunkedTokenLogprobs.apply(hidden, weight, bias, tokens, temperature, chunk_tokens, False)
    return logprobs


def chunked_token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """chunked_token_logprobs, bit by bit, and the entropy of the distributions that the tokens are drawn from.

    Args:
        hidden, weight, bias, tokens, temperature, chunk_tokens: as for chunked_token_logprobs.

    Returns:
        logprobs, entropy: (N,), nats, fp32 (fp64 for fp64 inputs), both differentiable (once) in hidden, weight and
        bias.

    Raises:
        ValueError: shapes do not fit, temperature <= 0 or chunk_tokens < 1.
    """
    _check_chunked(hidden, tokens, temperature, chunk_tokens)
    return _ChunkedTokenLogprobs.apply(hidden, weight, bias, tokens, temperature, chunk_tokens, True)


@torch.no_grad()
def chunked_full_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    *,
    temperature: float,
    chunk_tokens: int,
) -> Tensor:
    """full_kl from hidden states, with at most chunk_tokens rows of logits alive. Without gradient.

    Args:
        hidden, weight, bias: (N, H), (V, H), (V,) or None: the actor.
        ref_hidden, ref_weight, ref_bias: (N, H'), (V, H'), (V,) or None: the ref.
        temperature: > 0, the one that responses are sampled at.
        chunk_tokens: rows per chunk, >= 1.

    Returns:
        (N,), nats, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not fit, temperature <= 0 or chunk_tokens < 1.
    """
    if ref_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(f"ref_hidden has {ref_hidden.shape[0]} rows, hidden has {hidden.shape[0]}.")
    _check_chunk_scalars(temperature, chunk_tokens)
    kl = _empty_per_token(hidden)
    for rows in _chunks(hidden, chunk_tokens):
        logits = linear(hidden[rows], weight, bias)
        ref_logits = linear(ref_hidden[rows], ref_weight, ref_bias)
        kl[rows] = full_kl(logits, ref_logits, temperature=temperature)
    return kl


def chunked_full_kl_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_weights: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
) -> Tensor:
    """sum_i token_weights_i * KL_i of chunked_full_kl, as a term of a loss.

    The gradient is computed in the forward pass, since the ref's head need not be at hand in the backward pass
    (ZeRO-3 shards it again); Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.2.

    Args:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, chunk_tokens: as for chunked_full_kl.
        token_weights: (N,).

    Returns:
        scalar, fp32 (fp64 for fp64 inputs), differentiable (once) in hidden, weight and bias.

    Raises:
        ValueError: shapes do not fit, temperature <= 0 or chunk_tokens < 1.
    """
    if not len(hidden) == len(ref_hidden) == len(token_weights):
        raise ValueError(
            f"hidden has {len(hidden)} rows, ref_hidden {len(ref_hidden)} and token_weights {len(token_weights)}."
        )
    _check_chunk_scalars(temperature, chunk_tokens)
    ref = (ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    return _ChunkedFullKL.apply(hidden, weight, bias, *ref, token_weights, temperature, chunk_tokens)


class _ChunkedFullKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        token_weights: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        total = _empty_per_token(hidden[:0]).sum()
        sums = _ChunkGradients(hidden, weight, bias, ctx.needs_input_grad[:3], dtype=total.dtype)
        for rows in _chunks(hidden, chunk_tokens):
            log_p = _chunk_logits(hidden[rows], weight, bias, temperature).log_softmax(-1)
            log_ref = _chunk_logits(ref_hidden[rows], ref_weight, ref_bias, temperature).log_softmax(-1)
            p, difference = log_p.exp(), log_p - log_ref
            kl = (p * difference).sum(-1)
            total += (token_weights[rows] * kl).sum()
            # d KL / d logits = p (log p - log ref - KL) / temperature
            scale = (token_weights[rows] / temperature)[:, None]
            sums.add(rows, p.mul_(difference.sub_(kl[:, None])).mul_(scale))
        ctx.save_for_backward(*sums.gradients())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if tensor is None else tensor * grad.to(tensor.dtype) for tensor in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


class _ChunkedTokenLogprobs(torch.autograd.Function):
    """Log-probs (N,) and, if asked for, entropies (N,), otherwise (0,)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, log_normaliser = _empty_per_token(hidden), _empty_per_token(hidden)
        entropies = _empty_per_token(hidden if with_entropy else hidden[:0])
        log_p = None
        for rows in _chunks(hidden, chunk_tokens):
            del log_p  # before the next one is made
            log_p, log_normaliser[rows], logprobs[rows] = _chunk_logprobs(
                hidden[rows], weight, bias, tokens[rows], temperature
            )
            if with_entropy:
                entropies[rows] = _entropies(log_p)
        # The parameter and no view of it: ZeRO-3 empties and refills its .data, which only the saved leaf itself sees.
        ctx.save_for_backward(hidden, weight, bias, tokens, log_normaliser, entropies)
        # A single chunk is kept for the backward pass, which overwrites it; of several each is computed again.
        ctx.log_p = log_p if hidden.shape[0] <= chunk_tokens else None
        ctx.temperature, ctx.chunk_tokens, ctx.with_entropy = temperature, chunk_tokens, with_entropy
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, log_normaliser, entropies = ctx.saved_tensors
        log_p, ctx.log_p = ctx.log_p, None
        sums = _ChunkGradients(hidden, weight, bias, ctx.needs_input_grad[:3], dtype=log_normaliser.dtype)
        for rows in _chunks(hidden, ctx.chunk_tokens):
            if log_p is None:
                log_p = _chunk_logits(hidden[rows], weight, bias, ctx.temperature).sub_(log_normaliser[rows, None])
            # d logprob / d logits = (onehot(token) - p) / temperature
            scale = (grad[rows] / ctx.temperature)[:, None]
            factor = -scale
            if ctx.with_entropy:
                # d entropy / d logits = -p (log p + entropy) / temperature
                factor = factor - (grad_entropy[rows] / ctx.temperature)[:, None] * (log_p + entropies[rows, None])
            grad_logits = log_p.exp_().mul_(factor)
            grad_logits.scatter_add_(1, tokens[rows, None], scale)
            sums.add(rows, grad_logits)
            log_p = grad_logits = None  # before the next ones are made
        return *sums.gradients(), None, None, None, None


class _ChunkGradients:
    """Gradients of hidden states and head, from those of chunk after chunk of logits; None where nobody needs them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed, *, dtype: torch.dtype):
        needs_hidden, needs_weight, needs_bias = needed
        self.inputs, self.dtype = (hidden, weight, bias), dtype
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs_weight and len(hidden) == 0 else None
        self.needs_weight = needs_weight
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        hidden, weight, _ = self.inputs
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = input_gradient(grad_logits, weight)
        if self.needs_weight and self.weight is None:  # the first chunk, and often the only one
            self.weight = weight_gradient(grad_logits, hidden[rows]).to(self.dtype)
        elif self.needs_weight and self.dtype == hidden.dtype:
            self.weight.addmm_(grad_logits.t(), hidden[rows])
        elif self.needs_weight:
            self.weight += weight_gradient(grad_logits, hidden[rows])

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        _, weight, bias = self.inputs
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None else self.bias.to(bias.dtype),
        )


def _entropies(log_p: Tensor) -> Tensor:
    """(n,) of distributions given by their logarithms (n, V)."""
    return log_p.exp().mul_(log_p).sum(-1).neg_()


def _chunk_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: log p of the whole vocabulary (n, V), log-normaliser (n,), logprobs (n,). The only forward arithmetic,
    so that log-probs with and without gradient agree bit by bit."""
    logits = _chunk_logits(hidden, weight, bias, temperature)
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - log_normaliser
    return logits.sub_(log_normaliser[:, None]), log_normaliser, logprobs


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _chunks(hidden: Tensor, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, hidden.shape[0], chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _empty_per_token(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits / temperature, dim=-1)


def _check_chunked(hidden: Tensor, tokens: Tensor, temperature: float, chunk_tokens: int) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, must be (N, H).")
    if tokens.shape != hidden.shape[:1]:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be {tuple(hidden.shape[:1])} to fit hidden.")
    _check_chunk_scalars(temperature, chunk_tokens)


def _check_chunk_scalars(temperature: float, chunk_tokens: int) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0.")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be >= 1.")
