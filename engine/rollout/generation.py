"""Prompts + actor -> responses.

A response ends at its first end-of-sequence token; its row then leaves the batch and costs nothing more. The sampling
noise of every token is keyed by (seed, iteration, prompt, sample, position): the same prompts get the same responses on
one rank or on eight, and whatever is decoded next to them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.data.sequences import cut_by_length
from engine.models.scalar_head import scalar_product
from engine.rollout.kv_cache import is_preallocated, preallocated_cache


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order temperature, top-k, top-p, as in transformers.

    Attributes:
        temperature: 0 takes the likeliest token (not for training: such a response has no log-probability ratio).
        top_k, top_p: 0 and 1.0 switch them off.
        min_response_tokens: the end-of-sequence tokens have probability 0 before so many.
        vocabulary_size: ids from here on are never drawn: an embedding may have more rows than there are tokens.
    """

    max_response_tokens: int
    min_response_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    vocabulary_size: int | None = None


def noise_of_rows(keys: Sequence[tuple[int, ...]], length: int) -> Tensor:
    """(rows, length) uniform in [0, 1): each row's from a generator of its own, seeded by its key.

    Args:
        keys: e.g. (seed, iteration, prompt id, sample); equal keys give equal noise.
    """
    noise = torch.empty(len(keys), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, key in zip(noise, keys, strict=True):
        digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=8).digest()
        torch.rand(length, generator=generator.manual_seed(int.from_bytes(digest) >> 1), out=row)
    return noise


class Responses(NamedTuple):
    """One entry per prompt, in the prompts' order, with one number for every token. Log-probabilities and entropies are
    in nats, those of the moment of drawing.
    """

    tokens: list[list[int]]  # up to and including the first end-of-sequence token
    behaviour_logprobs: list[list[float]]  # of the distribution the token was drawn from, filters applied
    logprobs: list[list[float]]  # under the model, temperature applied and no filter
    entropy: list[list[float]]  # of the model's distribution, as in `logprobs`
    values: list[list[float]]  # V before the token, of a value head; 0 without one


def generate_responses(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], noise: Tensor, **given
) -> list[list[int]]:
    """The tokens of `sampled_responses`, which has the arguments."""
    return sampled_responses(model, prompts, noise, **given).tokens


@torch.no_grad()
def sampled_responses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    noise: Tensor,
    *,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    micro_batch_size: int,
    prefill_tokens: int | None = None,
    limits: Sequence[int] | None = None,
    value_head: nn.Linear | None = None,
    any_rank_active: Callable[[bool], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Responses:
    """Responses to prompts, each up to and including its first end-of-sequence token.

    Args:
        model: whole, in eval mode; or sharded, with `any_rank_active` to keep ranks in step.
        prompts: token ids, none empty.
        noise: (rows, max_response_tokens) uniform, from `noise_of_rows`.
        micro_batch_size: rows decoded at the same time.
        prefill_tokens: of prompts in one forward pass, padding included; those of all these rows when not given.
        limits: (rows,) tokens that each response may have at most, from 1; max_response_tokens when not given.
        value_head: one that reads the states which the model's own head reads; whole.
        any_rank_active: a collective that says whether some rank still decodes. Without it ranks are independent.
        on_token: told each row's number and its next token as soon as it is drawn.
    """
    responses = Responses(*([[] for _ in prompts] for _ in Responses._fields))
    limits = [sampling.max_response_tokens] * len(prompts) if limits is None else limits
    device = next(model.parameters()).device
    # Neighbours in length share a micro-batch: less left padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batches = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    given = dict(sampling=sampling, eos_token_ids=eos_token_ids, prefill_tokens=prefill_tokens, device=device)
    read = partial(_next_logits, model, value_head)
    for rows in batches:
        asked = _Asked(rows, [prompts[row] for row in rows], noise[rows], [limits[row] for row in rows])
        found = _decoded(model.config, read, asked, any_rank_active=any_rank_active, on_token=on_token, **given)
        for of_all, of_these in zip(responses, found, strict=True):
            for row, numbers in zip(rows, of_these, strict=True):
                of_all[row] = numbers
    while any_rank_active is not None and any_rank_active(False):
        _idle_step(read, device)
    return responses


def eos_token_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's, and what the model's generation config adds (chat models
    often have an end-of-turn token besides the end of sequence).
    """
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (tokenizer.eos_token_id, *more) if token is not None})


class _Asked(NamedTuple):
    """b rows that are decoded together, of neighbouring lengths, shortest first."""

    rows: list[int]  # their numbers among the prompts that were given
    prompts: list[Sequence[int]]
    noise: Tensor  # (b, max_response_tokens)
    limits: list[int]  # tokens of each response at most


class _Read(NamedTuple):
    """What b rows have after the tokens that they were given."""

    logits: Tensor  # (b, V) fp32
    values: Tensor  # (b,) fp32, zeros without a value head


def _next_logits(model: PreTrainedModel, value_head: nn.Linear | None, **given: Tensor | DynamicCache) -> _Read:
    """One forward pass; its tokens are cached."""
    if value_head is None:
        logits = model(use_cache=True, logits_to_keep=1, **given).logits[:, -1].float()
        return _Read(logits, logits.new_zeros(len(logits)))
    hidden = model.base_model(use_cache=True, **given).last_hidden_state[:, -1]
    return _Read(model.get_output_embeddings()(hidden).float(), scalar_product(hidden, value_head))


def _decoded(
    config: PreTrainedConfig,
    read: Callable[..., _Read],
    asked: _Asked,
    *,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    prefill_tokens: int | None,
    device: torch.device,
    any_rank_active: Callable[[bool], bool] | None,
    on_token: Callable[[int, int], None] | None,
) -> Responses:
    """Prefill, then a token at a time; rows that have ended leave the batch."""
    count, longest = len(asked.prompts), max(asked.limits)
    limit, uniform = torch.tensor(asked.limits, device=device), asked.noise.to(device)
    filters = _filters(sampling)
    eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
    drawn = [torch.zeros(count, longest, device=device) for _ in Responses._fields]
    drawn[0] = drawn[0].long()
    alive, lengths = torch.arange(count, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def answer(input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> _Read:
        if any_rank_active is not None:
            any_rank_active(True)
        return read(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)

    said, mask, cache = _prefilled(config, asked.prompts, longest, answer, tokens=prefill_tokens, device=device)
    position_ids, width = mask.sum(1, keepdim=True) - longest, mask.shape[1] - longest
    for step in range(longest):
        never = eos if step < sampling.min_response_tokens else None
        new = _draw(said.logits, uniform[:, step], sampling, filters, never)
        for column, numbers in zip(drawn, (*new, said.values), strict=True):
            column[alive, step] = numbers
        lengths[alive] += 1
        tokens = new.tokens
        if on_token is not None:
            for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                on_token(asked.rows[row], token)
        going_on = ~torch.isin(tokens, eos) & (step + 1 < limit)
        if not going_on.all():
            keep = going_on.nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            alive, limit = alive[keep], limit[keep]
            cache.batch_select_indices(keep)
            tokens, mask, uniform, position_ids = tokens[keep], mask[keep], uniform[keep], position_ids[keep]
        said = answer(tokens[:, None], mask[:, : width + step + 1], position_ids, cache)
        position_ids = position_ids + 1
    columns = (column.tolist() for column in drawn)
    ends = lengths.tolist()
    return Responses(*([row[:end] for row, end in zip(column, ends, strict=True)] for column in columns))


def _prefilled(
    config: PreTrainedConfig,
    prompts: list[Sequence[int]],
    room: int,
    answer: Callable[..., _Read],
    *,
    tokens: int | None,
    device: torch.device,
) -> tuple[_Read, Tensor, DynamicCache]:
    """Prompts of neighbouring lengths in passes of their own, for little padding, and one cache for all.

    Args:
        room: columns to leave for responses.
        tokens: of one pass at most, padding included.

    Returns:
        what the prompts have after them; the mask (b, widest + room), left-padded, response columns included: they are
        filled before being read; the cache.
    """
    sizes = [len(prompt) for prompt in prompts]
    widest = max(sizes)
    mask = torch.arange(widest + room) >= widest - torch.tensor(sizes)[:, None]
    cache = preallocated_cache(config, widest + room)
    by_length = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    parts = cut_by_length(by_length, sizes, token_budget=tokens or widest * len(sizes))
    if len(parts) == 1 or not is_preallocated(cache):
        parts = [range(len(sizes))]
    said = []
    for part in parts:
        rows = torch.tensor(part)
        width = max(sizes[row] for row in part)
        input_ids = torch.zeros(len(part), width, dtype=torch.int64)
        for line, row in enumerate(part):
            input_ids[line, width - sizes[row] :] = torch.as_tensor(prompts[row])
        own_mask = mask[rows, widest - width : widest].to(device)
        position_ids = (own_mask.cumsum(1) - 1).clamp(min=0)
        own = cache if len(parts) == 1 else preallocated_cache(config, width)
        said.append(answer(input_ids.to(device), own_mask, position_ids, own))
        for whole, layer in zip(cache.layers, own.layers, strict=True) if own is not cache else ():
            whole.take(rows.to(device), layer, of=len(sizes), length=widest)
    places = torch.tensor([row for part in parts for row in part], device=device).argsort()
    in_order = _Read(*(torch.cat(of_parts)[places] for of_parts in zip(*said, strict=True)))
    return in_order, mask.to(device), cache


def _filters(sampling: Sampling) -> LogitsProcessorList:
    filters = LogitsProcessorList()
    if sampling.top_k > 0:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        filters.append(TopPLogitsWarper(sampling.top_p))
    return filters


class _Draw(NamedTuple):
    """(b,) each, named as in `Responses`, of which the values are missing."""

    tokens: Tensor
    behaviour_logprobs: Tensor
    logprobs: Tensor
    entropy: Tensor


def _draw(
    logits: Tensor, uniform: Tensor, sampling: Sampling, filters: LogitsProcessorList, never: Tensor | None = None
) -> _Draw:
    """Tokens by inversion, each the first whose cumulative probability exceeds the noise.

    One number per token keys the draw, where torch.multinomial would take as many as the batch has rows. In fp64, since
    an fp32 running sum over a large vocabulary is off by more than a rare token's probability.

    Args:
        logits: (b, V) fp32.
        uniform: (b,) fp64 in [0, 1).
        never: ids that may not be drawn this time.
    """
    vocabulary = sampling.vocabulary_size or logits.shape[-1]
    possible = logits if sampling.temperature in (0.0, 1.0) else logits / sampling.temperature
    scaled = possible
    if vocabulary < logits.shape[-1] or never is not None:
        possible = scaled.clone()
        possible[:, vocabulary:] = -torch.inf
        if never is not None:
            possible[:, never] = -torch.inf
    if sampling.temperature == 0:
        nothing = logits.new_zeros(len(logits))
        return _Draw(possible.argmax(-1), nothing, nothing, nothing)
    own = behaviour = scaled.log_softmax(-1)
    own_probabilities = probabilities = own.exp()
    if possible is not scaled or len(filters) > 0:
        behaviour = filters(None, possible).log_softmax(-1)
        probabilities = behaviour.exp()
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # Past the end only if the logits are not finite: the step is then skipped on all ranks, if all ranks get there.
    tokens = tokens.clamp(max=vocabulary - 1)
    of_tokens = (of_all.gather(-1, tokens[:, None]).squeeze(-1) for of_all in (behaviour, own))
    return _Draw(tokens, *of_tokens, entropy=-(own_probabilities * own).sum(-1))


def _idle_step(read: Callable[..., _Read], device: torch.device) -> None:
    """A forward pass for the others' sake: under ZeRO-3 every layer's weights are gathered by all ranks or by none."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    read(input_ids=token, position_ids=torch.zeros_like(token), past_key_values=DynamicCache())
