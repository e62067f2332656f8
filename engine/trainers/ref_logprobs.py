"""Log-probabilities under DPO's ref: asked for every minibatch, or once and kept."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.config import DPOConfig
from engine.data import Examples
from engine.data.cache import found_tensors, keep_tensors
from engine.distributed import comm
from engine.distributed.initialize import Engine, WithoutAdapter, free, frozen_engine
from engine.models.language_model import check_packing, load_language_model
from engine.models.loading import fingerprint, load_tokenizer, read_alike
from engine.supervised_engine import check_sizes
from engine.trainers.objectives import logprobs_of_all


def ref_engine(config: DPOConfig, *, dtype: str) -> Engine:
    """The frozen ref. A collective.

    Raises:
        ValueError: it does not read the model's token ids, or not sequences of `data.max_length`.
    """
    tokenizer = _common_tokenizer(config)
    given = dict(dtype=getattr(torch, dtype), quantization=config.ref_quantization)
    build = partial(load_language_model, config.ref_name, **given)
    engine = frozen_engine(build, ds_config=config.ds_config_of("ref"), dtype=dtype)
    check_sizes(engine, role="ref", tokenizer=tokenizer, max_length=config.data.max_length)
    if config.packing:
        check_packing(engine.module.model)
    return engine


def online(ref: Engine | WithoutAdapter, config: DPOConfig) -> Callable[[Examples], Tensor]:
    """A function that asks the ref: (B,) log-probabilities of whole responses. The function is a collective."""
    return partial(
        logprobs_of_all,
        ref,
        token_budget=2 * config.micro_batch_tokens,
        chunk_tokens=config.logits_chunk_tokens,
        packed=config.packing,
    )


def with_ref_logprobs(parts: list[Examples], config: DPOConfig, *, dtype: str) -> list[Examples]:
    """The examples with the ref's log-probabilities, from the cache where the same ref has been asked before.

    Otherwise the ref is built, asked, and freed. A collective.

    Raises:
        ValueError: as `ref_engine`.
    """
    with comm.same_error_everywhere():
        _common_tokenizer(config)
        ref_files = fingerprint(config.ref_name)
        ref_files = [*ref_files, config.ref_quantization]
        keys = [["ref log-probabilities", part.digest, ref_files, dtype] for part in parts]
        found = [found_tensors(key) for key in keys]
    if not comm.all_true(None not in found):
        ref = ref_engine(config, dtype=dtype)
        found = [{"logprobs": online(ref, config)(part)} for part in parts]
        free(ref)
        with comm.same_error_everywhere():
            for key, tensors in zip(keys, found, strict=True) if comm.is_first_on_node() else ():
                keep_tensors(key, tensors)
    return [replace(part, ref_logprobs=tensors["logprobs"]) for part, tensors in zip(parts, found, strict=True)]


def _common_tokenizer(config: DPOConfig) -> PreTrainedTokenizerBase:
    """The model's, which the ref's has to equal: both read the same token ids."""
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    if not read_alike(load_tokenizer(config.ref_name), tokenizer):
        raise ValueError(
            f"The ref's tokenizer ({config.ref_name}) is not the model's ({config.model.model_name_or_path}). Name a "
            f"ref with the model's tokenizer: --ref.model_name_or_path."
        )
    return tokenizer
