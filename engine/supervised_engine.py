"""The one model that SFT, reward-model training and DPO train."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.config import SupervisedConfig
from engine.distributed.initialize import Engine, trained_engine
from engine.models.loading import vocabulary_size
from engine.models.lora import with_adapter


def supervised_engine(
    build_model: Callable[[], nn.Module],
    config: SupervisedConfig,
    *,
    role: Literal["model", "reward"],
    dtype: str,
    total_steps: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Engine:
    """A trained engine, of whose embeddings no token id and no position can lie outside. A collective.

    Args:
        build_model: makes the wrapper module; its `.model` is the transformers model.
        total_steps: optimizer steps of the run; with them the learning-rate schedule ends.

    Raises:
        ValueError: the model is too small for the tokenizer or for `data.max_length`.
    """
    if config.has_adapter:
        build_model = partial(with_adapter, build_model, seed=config.seed, **config.adapter)
    engine = trained_engine(
        build_model,
        ds_config=config.ds_config_of(role),
        dtype=dtype,
        learning_rate=config.learning_rate,
        adapter_learning_rate=config.adapter_learning_rate,
        lr_scheduler=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    check_sizes(engine, role=role, tokenizer=tokenizer, max_length=config.data.max_length)
    return engine


def check_sizes(engine: Engine, *, role: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """
    Raises:
        ValueError: a token id or a position would lie outside the model's embeddings.
    """
    model_config = engine.module.model.config.get_text_config()
    if model_config.vocab_size < vocabulary_size(tokenizer):
        raise ValueError(
            f"The {role} embeds {model_config.vocab_size} tokens and the tokenizer has {vocabulary_size(tokenizer)}: "
            f"some ids would be out of range."
        )
    positions = getattr(model_config, "max_position_embeddings", max_length)  # ALiBi models have no limit
    if positions < max_length:
        raise ValueError(
            f"The {role} was made for sequences of {positions} tokens, and data.max_length = {max_length}."
        )
