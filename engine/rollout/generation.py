"""Prompts + actor -> responses.

A response ends at its first end-of-sequence token; its row then leaves the batch and costs nothing more. The sampling
noise of every token is keyed by (seed, iteration, prompt, sample, position): the same prompts get the same responses on
one rank or on eight, and whatever is decoded next to them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.rollout.kv_cache import preallocated_cache


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
    """One entry per prompt, in the prompts' order."""

    tokens: list[list[int]]  # up to and including the first end-of-sequence token
    logprobs: list[list[float]]  # of these tokens when they were drawn, filters and temperature applied; nats


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
    limits: Sequence[int] | None = None,
    any_rank_active: Callable[[bool], bool] | None = None,
) -> Responses:
    """Responses to prompts, each up to and including its first end-of-sequence token.

    Args:
        model: whole, in eval mode; or sharded, with `any_rank_active` to keep ranks in step.
        prompts: token ids, none empty.
        noise: (rows, max_response_tokens) uniform, from `noise_of_rows`.
        micro_batch_size: rows decoded at the same time.
        limits: (rows,) tokens that each response may have at most, from 1; max_response_tokens when not given.
        any_rank_active: a collective that says whether some rank still decodes. Without it ranks are independent.
    """
    responses = Responses([[] for _ in prompts], [[] for _ in prompts])
    limits = [sampling.max_response_tokens] * len(prompts) if limits is None else limits
    device = next(model.parameters()).device
    # Neighbours in length share a micro-batch: less left padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batches = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    for rows in batches:
        _decode(model, prompts, noise, rows, limits, responses, sampling, eos_token_ids, device, any_rank_active)
    while any_rank_active is not None and any_rank_active(False):
        _idle_step(model, device)
    return responses


def eos_token_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's, and what the model's generation config adds (chat models
    often have an end-of-turn token besides the end of sequence).
    """
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (tokenizer.eos_token_id, *more) if token is not None})


def _decode(model, prompts, noise, rows, limits, responses, sampling, eos_token_ids, device, any_rank_active) -> None:
    width = max(len(prompts[row]) for row in rows)
    limit = torch.tensor([limits[row] for row in rows], device=device)
    longest = max(limits[row] for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width + longest, dtype=torch.bool)
    for line, row in enumerate(rows):
        input_ids[line, width - len(prompts[row]) :] = torch.tensor(prompts[row])
        mask[line, width - len(prompts[row]) :] = True  # response columns included: they are filled before being read
    input_ids, mask = input_ids.to(device), mask.to(device)
    position_ids = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    uniform = noise[rows].to(device)
    warp = _warpers(sampling)
    eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
    cache = preallocated_cache(model.config, width + longest)
    alive = list(rows)
    for step in range(longest):
        if any_rank_active is not None:
            any_rank_active(True)
        logits = (
            model(
                input_ids=input_ids,
                attention_mask=mask[:, : width + step],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        if sampling.vocabulary_size is not None:
            logits[:, sampling.vocabulary_size :] = -torch.inf
        if step < sampling.min_response_tokens:
            logits[:, eos] = -torch.inf
        tokens, logprobs = _draw(logits, uniform[:, step], sampling, warp)
        for row, token, logprob in zip(alive, tokens.tolist(), logprobs.tolist(), strict=True):
            responses.tokens[row].append(token)
            responses.logprobs[row].append(logprob)
        going_on = ~torch.isin(tokens, eos) & (step + 1 < limit)
        if not going_on.all():
            keep = going_on.nonzero().squeeze(-1)
            if len(keep) == 0:
                return
            alive = [alive[line] for line in keep.tolist()]
            cache.batch_select_indices(keep)
            tokens, mask, uniform, position_ids = tokens[keep], mask[keep], uniform[keep], position_ids[keep]
            limit = limit[keep]
        input_ids, position_ids = tokens[:, None], position_ids[:, -1:] + 1


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warp = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        warp.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return warp


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling, warp: LogitsProcessorList) -> tuple[Tensor, Tensor]:
    """(b,) tokens by inversion, the first whose cumulative probability exceeds the noise; (b,) their log-probabilities.

    One number per token keys the draw, where torch.multinomial would take as many as the batch has rows. In fp64, since
    an fp32 running sum over a large vocabulary is off by more than a rare token's probability.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logprobs = warp(None, logits).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # Past the end only if the logits are not finite: the step is then skipped on all ranks, if all ranks get there.
    tokens = tokens.clamp(max=(sampling.vocabulary_size or logits.shape[-1]) - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _idle_step(model: PreTrainedModel, device: torch.device) -> None:
    """A forward pass for the others' sake: under ZeRO-3 every layer's weights are gathered by all ranks or by none."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(input_ids=token, position_ids=torch.zeros_like(token), use_cache=True, past_key_values=DynamicCache())
