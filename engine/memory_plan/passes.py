"""What one forward (and backward) pass takes above weights and gradients, found by running the engine's own model code
on tensors without data and counting the bytes of the storages that live.

Assumed:
- The attention kernel is a fused one (flash, or memory-efficient): it keeps queries, keys, values, output and one
  number per query and head. torch 2.13 makes tensors without data only for devices that it is built for, so the CPU's
  fused kernel is run in the place of the GPU's, which keeps the same tensors. A mask that a model insists on counts.
- What a kernel uses inside of itself (workspaces of matrix products) is not seen.
- Every row is as long as the longest. A micro-batch holds at most `micro_batch_tokens` tokens, padding included, so
  that full rows up to that budget bound any mixture of lengths: fewer tokens, and no row longer.
- All layers are alike: two depths are measured, the rest follows a straight line.
- What is quantised is counted as if it were not, and the one weight that is unpacked at a time is left out.
- The entropy is asked for where nothing is trained, as rollouts ask for it; a bonus for it in the loss
  (`entropy_coef`) takes one chunk of logits more than is said here.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from engine.algorithms.logprobs import chunked_full_kl, chunked_full_kl_sum
from engine.algorithms.losses import clipped_policy_loss, clipped_value_loss
from engine.models.modes import checkpoint_activations

DEPTHS = (2, 4)  # of the models measured: from the second layer on each takes the same


@dataclass(frozen=True)
class PassPeak:
    """Bytes above weights and gradients."""

    saved_bytes: int  # what autograd holds when the forward pass is over; 0 without a backward pass
    peak_bytes: int


def pass_peak(
    build_model: Callable[[], nn.Module],
    *,
    tokens: int,
    rows: int,
    trained: bool,
    checkpointing: bool,
    dtype: torch.dtype,
    logits_chunk_tokens: int,
    response_tokens: int,
    head: Literal["language", "score"],
    kl_full: bool = False,
) -> PassPeak:
    """Of one micro-batch, run as in `rollout/measuring.py` (not trained) or in `trainers/ppo_update.py` (trained).

    Args:
        build_model: makes the wrapper module, dropout off and adapters in; on the meta device, where it is large. Its
            weights' values and dtype do not matter.
        tokens: of each row, prompt and response.
        rows: of the micro-batch, all of that length.
        checkpointing: activations are computed again in the backward pass.
        dtype: of the weights.
        response_tokens: those of a row whose log-probabilities or values are asked for.
        head: what answers: a `LanguageModel` or a `ScalarHeadModel`.
        kl_full: with the KL to a ref over the whole vocabulary, whose model is of the actor's shape.

    Raises:
        ValueError: there is no response, or what the model computes depends on its data (experts that are picked).
    """
    if not 1 <= response_tokens <= tokens:
        raise ValueError(f"response_tokens={response_tokens} must be 1 to tokens={tokens}.")
    module = build_model()
    layers = _layers(module)
    depth, peaks = len(layers), {}
    for measured in sorted({min(depth, d) for d in DEPTHS}, reverse=True):
        del layers[measured:]
        with FakeTensorMode(), _unpacked_rows():
            _take_data_out(module, dtype)
            if trained and checkpointing:
                checkpoint_activations(module)
            module.train(trained)
            run = _Pass(module, head, logits_chunk_tokens, kl_full, rows=rows, tokens=tokens, responses=response_tokens)
            try:
                peaks[measured] = run.trained() if trained else run.answering()
            except RuntimeError as error:
                raise ValueError(f"{_name(module)} does not run on tensors without data: {error}") from error
    return PassPeak(
        saved_bytes=_at_depth(depth, {d: p.saved_bytes for d, p in peaks.items()}),
        peak_bytes=_at_depth(depth, {d: p.peak_bytes for d, p in peaks.items()}),
    )


class LiveBytes(TorchDispatchMode):
    """Inside the block, the bytes of all storages that were made in it and live, and the most there were."""

    def __init__(self, uncounted: Sequence[Tensor]):
        """
        Args:
            uncounted: tensors that were there before, and are written to in the block.
        """
        super().__init__()
        self.live = self.peak = 0
        self.known = {}  # what is counted, and the finalizer that keeps the reference to it
        for tensor in uncounted:
            self.known[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_mkldnn:  # packed weights show no storage
                self._count(tensor, id(tensor), tensor.nbytes)
            elif isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, storage._cdata, storage.nbytes())
        return result

    def _count(self, held: Tensor | torch.UntypedStorage, key: int, size: int) -> None:
        if key not in self.known:
            self.known[key] = weakref.ref(held, lambda _: self._freed(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        del self.known[key]


@dataclass(frozen=True)
class _Pass:
    """The calls of one micro-batch; `head`, `chunk_tokens` and `kl_full` as in `pass_peak`."""

    module: nn.Module
    head: str
    chunk_tokens: int
    kl_full: bool
    rows: int
    tokens: int
    responses: int

    def answering(self) -> PassPeak:
        """Forward alone."""
        with torch.no_grad(), LiveBytes([*self.module.parameters(), *self.module.buffers()]) as bytes_:
            said = self._answer(with_entropy=True)
            if self.kl_full:
                theirs = self._answer()
                chunked_full_kl(said.hidden, *self._head, theirs.hidden, *self._head, **self._given)
        return PassPeak(saved_bytes=0, peak_bytes=bytes_.peak)

    def trained(self) -> PassPeak:
        """Forward and backward, onto gradients that are there already."""
        weights = list(self.module.parameters())
        for weight in weights:
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with LiveBytes([*weights, *gradients, *self.module.buffers()]) as bytes_:
            said = self._answer()
            loss = self._loss(said)
            saved = bytes_.live
            loss.backward()
        return PassPeak(saved_bytes=saved, peak_bytes=bytes_.peak)

    @property
    def _head(self) -> tuple[Tensor, Tensor | None]:
        return self.module.head.weight, self.module.head.bias

    @property
    def _given(self) -> dict[str, float]:
        return dict(temperature=1.0, chunk_tokens=self.chunk_tokens)

    def _answer(self, *, with_entropy: bool = False):
        input_ids = torch.empty(self.rows, self.tokens, dtype=torch.int64)
        positions = torch.empty(self.rows * self.responses, dtype=torch.int64)
        if self.head == "score":
            return self.module(input_ids, positions)
        return self.module(input_ids, positions, positions.clone(), with_entropy=with_entropy, **self._given)

    def _loss(self, said) -> Tensor:
        """PPO's, of the micro-batch alone."""
        number = said if self.head == "score" else said.logprobs
        old, target = torch.empty_like(number), torch.empty_like(number)
        mask, count = torch.ones_like(old, dtype=torch.bool), len(number)
        if self.head == "score":
            return clipped_value_loss(number, old, target, mask, value_clip_range=0.2, count=count)
        loss = clipped_policy_loss(number, old, target, mask, clip_range=0.2, count=count, weights=torch.ones_like(old))
        if said.values is not None:  # a shared trunk's
            loss = loss + clipped_value_loss(said.values, old, target, mask, value_clip_range=0.2, count=count)
        if self.kl_full:
            with torch.no_grad():
                theirs = self._answer()
            both = (said.hidden, *self._head, theirs.hidden, *self._head)
            loss = loss + chunked_full_kl_sum(*both, torch.ones_like(old), **self._given)
        return loss


def _layers(module: nn.Module) -> nn.ModuleList:
    """The backbone's, as the one list that its config counts."""
    depth = module.model.config.get_text_config().num_hidden_layers
    lists = (part for part in module.model.base_model.modules() if isinstance(part, nn.ModuleList))
    found = next((part for part in lists if len(part) == depth), None)
    if found is None:
        raise ValueError(f"{_name(module)} has no list of its {depth} layers.")
    return found


def _name(module: nn.Module) -> str:
    return type(module.model).__name__


def _take_data_out(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers of the same shapes without data, floating parameters in `dtype`; tied ones stay tied."""
    empty: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight not in empty:
                of = torch.empty(weight.shape, dtype=dtype if weight.is_floating_point() else weight.dtype)
                empty[weight] = nn.Parameter(of, requires_grad=weight.requires_grad)
            part.register_parameter(name, empty[weight])
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _unpacked_rows() -> Iterator[None]:
    """transformers 5.23 looks into position ids for documents packed into one row, which no tensor without data can
    answer, and otherwise makes a mask: the engine's rows hold one each.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _at_depth(depth: int, measured: dict[int, int]) -> int:
    """On the straight line through what was measured."""
    (shallow, low), *deeper = sorted(measured.items())
    if not deeper:
        return low
    ((deep, high),) = deeper
    return low + (high - low) * (depth - shallow) // (deep - shallow)
