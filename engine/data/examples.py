"""What SFT, reward model and DPO learn from: demonstrations (one response) and preferences (two)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from engine.data.batches import GlobalBatches
from engine.data.cache import digest_of
from engine.data.exchanges import LengthLimit, concatenated, rows_of, tokenised
from engine.data.formatting import ASSISTANT_TURN, as_prompt, exchange
from engine.data.sequences import Sequences
from engine.data.sources import (
    PROMPT_COLUMNS,
    RESPONSE_COLUMNS,
    Source,
    at,
    load_source,
    mixed_rows,
    mixture,
    split_rows,
)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """E examples of `rows_per_example` sequences each; the same on every rank.

    Demonstrations have one row each. Preferences have two: example e's chosen response is row 2e, its rejected one
    row 2e + 1.
    """

    sequences: Sequences  # E * rows_per_example rows
    rows_per_example: int
    margins: Tensor  # (E,) fp32, in units of the score; 0 for demonstrations
    ref_logprobs: Tensor | None = None  # (E * rows_per_example,) of whole responses under DPO's ref

    def __post_init__(self):
        rows, shape = len(self) * self.rows_per_example, tuple(self.margins.shape)
        if shape != (len(self),) or len(self.sequences) != rows:
            raise ValueError(f"Examples has {len(self.sequences)} sequences and margins {shape}; {rows} were expected.")
        if self.ref_logprobs is not None and self.ref_logprobs.shape != (rows,):
            raise ValueError(f"Examples.ref_logprobs has shape {tuple(self.ref_logprobs.shape)}, must be ({rows},).")

    def __len__(self) -> int:
        return len(self.margins)

    def __getitem__(self, picked: Tensor) -> "Examples":
        rows = self.rows(picked)
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        return replace(self, sequences=self.sequences[rows], margins=self.margins[picked], ref_logprobs=ref)

    def rows(self, picked: Tensor) -> Tensor:
        """The sequences of these examples."""
        return (picked[:, None] * self.rows_per_example + torch.arange(self.rows_per_example)).flatten()

    def batches(self, size: int) -> Iterator["Examples"]:
        """All examples in order, `size` at a time."""
        for picked in torch.arange(len(self)).split(size):
            yield self[picked]

    @property
    def digest(self) -> str:
        """Of the token ids and margins: what ranks compare, and what precomputed log-probabilities are kept under."""
        sequences = self.sequences
        tensors = (sequences.tokens, sequences.prompt_lengths, sequences.response_lengths, self.margins)
        return digest_of([digest_of(tensor) for tensor in tensors])


class ExampleNumbers(Dataset):
    """An item is an example's number; `examples` has the rest. Batches are made by `Examples.__getitem__`."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index

    def batch(self, numbers: list[int]) -> Examples:
        return self.examples[torch.tensor(numbers)]


def create_example_dataloader(args, examples: Examples) -> tuple[DataLoader, int]:
    """(dataloader, num_total_iters): minibatches of all ranks' examples, and the run's optimizer steps."""
    numbers = ExampleNumbers(examples)
    batches = GlobalBatches(len(numbers), args.minibatch_size, seed=args.seed)
    dataloader = DataLoader(numbers, batch_sampler=batches, collate_fn=numbers.batch)
    return dataloader, args.num_iterations or args.num_train_epochs * len(dataloader)


def load_demonstrations(
    args, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[Examples, Examples | None]:
    """(train, held out or None) of an SFT run.

    Args:
        say: called with each line that the user should read.

    Raises:
        ValueError: names file and line of a row that is not a demonstration.
    """
    train, held_out = _train_and_held_out(args, tokenizer, _demonstrations, say)
    if args.loss_on == "sequence":
        return _learned_whole(train), None if held_out is None else _learned_whole(held_out)
    return train, held_out


def load_preferences(
    args, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[Examples, Examples | None]:
    """(train, held out or None) of a reward-model or DPO run; as `load_demonstrations`."""
    return _train_and_held_out(args, tokenizer, _preferences, say)


def _train_and_held_out(args, tokenizer, load, say) -> tuple[Examples, Examples | None]:
    data = args.data
    options = dict(subset=data.train_subset, max_samples=data.max_samples)
    parts = [load(load_source(name, split=data.train_split, **options), args, tokenizer, say) for name in data.sources]
    rows = mixed_rows([len(part) for part in parts], data.weights, seed=args.seed)
    for line in mixture(data.sources, [len(part) for part in parts], rows) if data.weights is not None else []:
        say(line)
    train = Examples(
        sequences=concatenated([part.sequences for part in parts]),
        rows_per_example=parts[0].rows_per_example,
        margins=torch.cat([part.margins for part in parts]),
    )[torch.tensor(rows)]
    if data.eval is not None:
        return train, load(load_source(data.eval, split=data.eval_split, **options), args, tokenizer, say)
    if data.eval_fraction > 0:
        return _split_by_prompt(train, data.eval_fraction, seed=args.seed)
    return train, None


def _learned_whole(examples: Examples) -> Examples:
    """Everything that has a token before it to be predicted from counts as the response."""
    sequences = examples.sequences
    ones = torch.ones_like(sequences.prompt_lengths)
    whole = Sequences(tokens=sequences.tokens, prompt_lengths=ones, response_lengths=sequences.lengths - 1)
    return replace(examples, sequences=whole)


def _split_by_prompt(examples: Examples, fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """What is held out asks nothing that is trained on: all examples of a prompt fall on one side."""
    prompts = [tuple(prompt) for prompt, _ in list(rows_of(examples.sequences))[:: examples.rows_per_example]]
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    _, held_out = split_rows(len(number), fraction, seed=seed)
    is_held_out = torch.zeros(len(number), dtype=torch.bool)
    is_held_out[held_out] = True
    chosen = is_held_out[torch.tensor([number[prompt] for prompt in prompts])]
    return examples[(~chosen).nonzero().squeeze(1)], examples[chosen.nonzero().squeeze(1)]


def _demonstrations(source: Source, args, tokenizer, say) -> Examples:
    data = args.data
    prompt = source.column(data.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
    response = source.column_if_any(data.response_column, RESPONSE_COLUMNS, "--data.response_column")
    first = source.rows[0].get(prompt)
    if response is None and isinstance(first, str) and ASSISTANT_TURN not in first:  # no conversation to be split
        response = source.column(None, RESPONSE_COLUMNS, "--data.response_column")
    pairs = []
    for row, place in zip(source.rows, source.places, strict=True):
        if response is None:
            pairs.append(at(f"{place}, column {prompt!r}", exchange, None, row.get(prompt)))
        else:
            asked = at(f"{place}, column {prompt!r}", as_prompt, row.get(prompt), data.prompt_format)
            pairs.append(at(f"{place}, column {response!r}", exchange, asked, row.get(response)))
    sequences = tokenised(pairs, source.places, tokenizer)
    examples = Examples(sequences=sequences, rows_per_example=1, margins=torch.zeros(len(pairs)))
    return _within_limits(examples, source.places, source, args, say)


def _preferences(source: Source, args, tokenizer, say) -> Examples:
    data = args.data
    prompt = source.column_if_any(data.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
    answers = (
        source.column(data.chosen_column, ("chosen",), "--data.chosen_column"),
        source.column(data.rejected_column, ("rejected",), "--data.rejected_column"),
    )
    margin = source.column_if_any(data.margin_column, (), "--data.margin_column")
    pairs, margins = [], []
    for row, place in zip(source.rows, source.places, strict=True):
        asked = (
            None
            if prompt is None
            else at(f"{place}, column {prompt!r}", as_prompt, row.get(prompt), data.prompt_format)
        )
        pairs += [at(f"{place}, column {column!r}", exchange, asked, row.get(column)) for column in answers]
        margins.append(0.0 if margin is None else at(f"{place}, column {margin!r}", _number, row.get(margin)))
    sequences = tokenised(pairs, [place for place in source.places for _ in answers], tokenizer)
    examples = Examples(sequences=sequences, rows_per_example=2, margins=torch.tensor(margins, dtype=torch.float32))
    asked = [prompt for prompt, _ in pairs]
    answers_one_prompt = [ours == theirs for ours, theirs in zip(asked[::2], asked[1::2], strict=True)]
    examples = _only(examples, answers_one_prompt, source, "answer two different prompts", say)
    places = [place for place, one in zip(source.places, answers_one_prompt, strict=True) if one]
    examples = _within_limits(examples, places, source, args, say)
    rows = list(rows_of(examples.sequences))
    differ = [chosen != rejected for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
    return _only(examples, differ, source, "have chosen == rejected", say)


def _only(pairs: Examples, wanted: list[bool], source: Source, flaw: str, say) -> Examples:
    """The wanted pairs; the others are dropped and counted."""
    if not all(wanted):
        said = f"{len(wanted) - sum(wanted)} of {len(wanted)} pairs of {source.name} {flaw}"
        if not any(wanted):
            raise ValueError(f"{said}: nothing can be learned from them.")
        say(f"{said}: dropped.")
    return pairs[torch.tensor(wanted).nonzero().squeeze(1)]


def _within_limits(examples: Examples, places: list[str], source: Source, args, say) -> Examples:
    data = args.data
    limit = LengthLimit(
        max_prompt_tokens=data.max_prompt_tokens, max_length=data.max_length, over_length=data.over_length
    )
    too_long = limit.too_long(examples.sequences).view(-1, examples.rows_per_example).any(1)
    number = int(too_long.sum())
    if number == 0:
        return examples
    said = (
        f"{number} of {len(examples)} rows of {source.name} exceed data.max_prompt_tokens={data.max_prompt_tokens} or "
        f"data.max_length={data.max_length}"
    )
    if data.over_length == "error":
        raise ValueError(f"{said}, first at {places[int(too_long.nonzero()[0])]}.")
    if data.over_length == "drop":
        if number == len(examples):
            raise ValueError(f"{said}: dropping them leaves nothing. Raise the limit.")
        say(f"{said}: dropped.")
        return examples[(~too_long).nonzero().squeeze(1)]
    say(f"{said}: shortened ({data.over_length}).")
    return replace(examples, sequences=limit.shortened(examples.sequences, rows_per_example=examples.rows_per_example))


def _number(cell) -> float:
    """A number, or text that is one: a CSV file holds nothing but text."""
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not torch.tensor(number, dtype=torch.float32).isfinite():
        raise ValueError(f"a margin is a number, this is {str(cell)[:80]!r}.")
    return number
