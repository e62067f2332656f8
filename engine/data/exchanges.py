"""Prompt-response pairs in token ids, and what is done with those that are too long."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.data.cache import digest_of_tokenizer, kept_tensors
from engine.data.formatting import ASSISTANT_TURN, Prompt, encode_exchange, render, render_response
from engine.data.sequences import Sequences
from engine.data.sources import at

OverLength = Literal["drop", "error", "truncate_left", "truncate_right"]


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """How long a row may be, in tokens, and what is done with one that is longer.

    Attributes:
        max_length: of prompt and response together.
    """

    max_prompt_tokens: int
    max_length: int
    over_length: OverLength

    def too_long(self, sequences: Sequences) -> Tensor:
        """(B,) bool."""
        return (sequences.prompt_lengths > self.max_prompt_tokens) | (sequences.lengths > self.max_length)

    @property
    def prompt_room(self) -> int:
        """Tokens of a prompt that has a response of one token."""
        return min(self.max_prompt_tokens, self.max_length - 1)

    def shortened(self, sequences: Sequences, *, rows_per_example: int, bos_token_id: int | None) -> Sequences:
        """Every row within the limits: `truncate_left` keeps a prompt's end, `truncate_right` its beginning; what is
        then still too long loses more of the prompt's beginning, or of the response's end, down to one token. The
        rows of an example keep the same prompt.
        """
        rows = list(rows_of(sequences))
        prompts, responses = [], []
        for start in range(0, len(rows), rows_per_example):
            example = rows[start : start + rows_per_example]
            longest = min(self.max_length - 1, max(len(response) for _, response in example))
            left = min(self.max_prompt_tokens, self.max_length - longest)
            room = left if self.over_length == "truncate_left" else self.prompt_room
            for prompt, response in example:
                prompts.append(shortened_prompt(prompt, room, self.over_length, bos_token_id=bos_token_id))
                responses.append(response[: self.max_length - len(prompts[-1])])
        return Sequences.of(prompts, responses)


def shortened_prompt(prompt: list[int], room: int, over_length: OverLength, *, bos_token_id: int | None) -> list[int]:
    """At most `room` tokens, at least 1: the end, after a beginning-of-sequence token if the prompt has one; or the
    beginning.
    """
    if over_length == "truncate_right" or len(prompt) <= room:
        return prompt[:room]
    first = [token for token in prompt[:1] if token == bos_token_id]
    return first + prompt[len(prompt) - room + len(first) :]


def check_end_can_go(prompt: Prompt, over_length: OverLength) -> None:
    """Nothing a model knows is answered without the mark where the assistant's turn begins.

    Raises:
        ValueError: that mark would be cut off.
    """
    if over_length == "truncate_right" and (not isinstance(prompt, str) or prompt.endswith(ASSISTANT_TURN)):
        raise ValueError(
            "the prompt is a conversation that is too long, and truncate_right would cut off where the answer begins. "
            "Use --data.over_length truncate_left or drop, or raise the limit."
        )


def tokenised(
    exchanges: Iterable[tuple[Prompt, str]], places: list[str], tokenizer: PreTrainedTokenizerBase
) -> Sequences:
    """Rendered and encoded, one sequence per exchange, from the cache where that has been done before.

    Args:
        places: of each exchange, for errors.

    Raises:
        ValueError: names the place of an exchange that cannot be rendered.
    """
    exchanges = list(exchanges)

    def made() -> dict[str, Tensor]:
        prompts, responses = [], []
        for (prompt, response), place in zip(exchanges, places, strict=True):
            texts = at(place, render, prompt, tokenizer), at(place, render_response, prompt, response, tokenizer)
            ids = at(place, encode_exchange, *texts, tokenizer)
            if not ids[0]:
                raise ValueError(f"{place}: the prompt has no tokens.")
            prompts.append(ids[0])
            responses.append(ids[1])
        sequences = Sequences.of(prompts, responses)
        return {name: getattr(sequences, name) for name in ("tokens", "prompt_lengths", "response_lengths")}

    return Sequences(**kept_tensors([exchanges, digest_of_tokenizer(tokenizer)], made))


def rows_of(sequences: Sequences) -> Iterable[tuple[list[int], list[int]]]:
    """(prompt, response) of every row, in token ids."""
    assert sequences.gaps is None, "the response of an episode is not in one piece"
    start = 0
    for prompt, response in zip(sequences.prompt_lengths.tolist(), sequences.response_lengths.tolist(), strict=True):
        middle, end = start + prompt, start + prompt + response
        yield sequences.tokens[start:middle].tolist(), sequences.tokens[middle:end].tolist()
        start = end


def concatenated(parts: list[Sequences]) -> Sequences:
    """The rows of all parts, in order."""
    names = ("tokens", "prompt_lengths", "response_lengths")
    return Sequences(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
