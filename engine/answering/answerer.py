"""A loaded model that answers prompts by the training's own sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.answering.model_folder import load_for_answering, model_folder
from engine.answering.settings import AnsweringConfig, own_names
from engine.config.roles import resolved_dtype
from engine.models.loading import vocabulary_size
from engine.rollout.generation import Sampling, eos_token_ids_of, noise_of_rows, sampled_responses

USUAL_RESPONSE_TOKENS = 256


class Answer(NamedTuple):
    """Attributes:
    finished: ended by an end-of-sequence token, and not cut off.
    tokens: how many, that one included.
    """

    text: str
    finished: bool
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Attributes:
    label: what tells it from the other one.
    max_prompt_tokens: what a prompt may have; None where nothing limits it.
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    eos_token_ids: list[int]
    max_prompt_tokens: int | None

    def answers(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        *,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """
        Args:
            prompts: token ids.
            keys: of the noise of each prompt; see `noise_of_rows`.
            on_token: as in `sampled_responses`.

        Raises:
            ValueError: they do not fit into the GPU's memory.
        """
        try:
            responses = sampled_responses(
                self.model,
                prompts,
                noise_of_rows(keys, self.sampling.max_response_tokens),
                sampling=self.sampling,
                eos_token_ids=self.eos_token_ids,
                micro_batch_size=len(prompts),
                on_token=on_token,
            ).tokens
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(prompts)} prompts of up to {max(map(len, prompts))} tokens and their responses do not fit into "
                f"the GPU's memory. Lower --batch_size, --max_prompt_tokens or --max_response_tokens."
            ) from error
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses)
        ended = (tokens[-1] in self.eos_token_ids for tokens in responses)
        return [Answer(*answer) for answer in zip(texts, ended, map(len, responses), strict=True)]


def load_answerers(config: AnsweringConfig) -> list[Answerer]:
    """The model, and the other one if there is one.

    Raises:
        ValueError: one of them does not load, or the device is not there.
    """
    device = _device(config.device)
    dtype = getattr(torch, resolved_dtype(config.dtype, on_gpu=device.type != "cpu"))
    names = [name for name in (config.model, config.other) if name is not None]
    folders = [model_folder(name) for name in names]
    return [
        _answerer(config, folder, label, dtype=dtype, device=device)
        for folder, label in zip(folders, labels(names), strict=True)
    ]


def _answerer(
    config: AnsweringConfig, folder: str, label: str, *, dtype: torch.dtype, device: torch.device
) -> Answerer:
    with own_names():
        model, tokenizer = load_for_answering(folder, dtype=dtype, chat_template=config.chat_template)
    context = getattr(model.config, "max_position_embeddings", None)  # ALiBi models have no limit
    response = config.max_response_tokens or min(USUAL_RESPONSE_TOKENS, (context or 2 * USUAL_RESPONSE_TOKENS) // 2)
    prompt = config.max_prompt_tokens or (None if context is None else context - response)
    if context is not None and (prompt < 1 or prompt + response > context):
        raise ValueError(
            f"max_prompt_tokens={config.max_prompt_tokens} and max_response_tokens={response} do not fit into the "
            f"{context} tokens that {folder} was made for: lower one of them."
        )
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{folder} in {dtype} does not fit into the memory of {device}.") from error
    return Answerer(
        label=label,
        model=model,
        tokenizer=tokenizer,
        sampling=Sampling(
            max_response_tokens=response,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            vocabulary_size=vocabulary_size(tokenizer),
        ),
        eos_token_ids=eos_token_ids_of(model, tokenizer),
        max_prompt_tokens=prompt,
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name} is no device; cpu, cuda and cuda:1 are.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: there are {torch.cuda.device_count()} GPUs here. Name another, or cpu.")
    return device


def labels(names: Sequence[str]) -> list[str]:
    """The ends of what the user calls them, as long as it takes to tell them apart."""
    parts = [Path(name).expanduser().absolute().parts for name in names]  # "." has none of its own
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return ["model", "other"]
