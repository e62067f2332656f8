"""Prompts for PPO: rows -> token ids -> this rank's share of every iteration's batch.

The order of prompts depends on the seed alone, never on the number of ranks: iteration i draws the same prompts on one
rank and on sixty-four, and rank r takes the r-th contiguous part of them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from engine.data.formatting import encode, render
from engine.data.sources import PROMPT_COLUMNS, Source, load_source


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This rank's prompts of one iteration, in dataset terms.

    Attributes:
        tokens: one list of token ids per prompt.
        texts: the same prompts as the model sees them.
        ids: each prompt's row number in the dataset; with the seed and the iteration it keys the sampling noise.
        columns: the dataset's columns, a list per column, for score functions.
    """

    tokens: list[list[int]]
    texts: list[str]
    ids: list[int]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.ids)

    def repeated(self, times: int) -> "PromptBatch":
        """Every prompt `times` times in a row."""
        rows = [row for row in range(len(self)) for _ in range(times)]
        return PromptBatch(
            tokens=[self.tokens[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
        )


class PromptDataset(Dataset):
    """Tokenised prompts with the columns they came with. An item is its own row number: batches are made by `batch`."""

    def __init__(self, source: Source, column: str, tokenizer: PreTrainedTokenizerBase):
        self.source, self.tokenizer = source, tokenizer
        self.texts = [
            _at(place, column, render, row.get(column), tokenizer)
            for row, place in zip(source.rows, source.places, strict=True)
        ]
        self.tokens = [
            _at(place, column, encode, text, tokenizer) for text, place in zip(self.texts, source.places, strict=True)
        ]
        self.kept = list(range(len(self.tokens)))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> int:
        return self.kept[index]

    def batch(self, rows: list[int]) -> PromptBatch:
        columns = dict.fromkeys(name for row in self.source.rows for name in row)  # rows may differ in theirs
        return PromptBatch(
            tokens=[self.tokens[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ids=list(rows),
            columns={name: [self.source.rows[row].get(name) for row in rows] for name in columns},
        )

    @property
    def digest(self) -> str:
        """Of the prompts in use, for ranks to compare."""
        return hashlib.sha256(repr([self.tokens[row] for row in self.kept]).encode()).hexdigest()

    def limit_length(self, max_prompt_tokens: int, over_length: str) -> str | None:
        """Apply the over-length policy. Returns what to tell the user, or None when no prompt was too long.

        Raises:
            ValueError: the policy is `error`, or `drop` leaves nothing.
        """
        too_long = [row for row, tokens in enumerate(self.tokens) if len(tokens) > max_prompt_tokens]
        if not too_long:
            return None
        said = f"{len(too_long)} of {len(self.tokens)} prompts of {self.source.name} exceed {max_prompt_tokens} tokens"
        if over_length == "error":
            raise ValueError(f"{said}, first at {self.source.places[too_long[0]]}. Raise --data.max_prompt_tokens.")
        if over_length == "drop":
            self.kept = sorted(set(self.kept) - set(too_long))
            if not self.kept:
                raise ValueError(f"{said}: dropping them leaves nothing. Raise --data.max_prompt_tokens.")
            return f"{said}: dropped."
        keep = slice(-max_prompt_tokens, None) if over_length == "truncate_left" else slice(max_prompt_tokens)
        for row in too_long:
            self.tokens[row] = self.tokens[row][keep]
            self.texts[row] = self.tokenizer.decode(self.tokens[row])
        return f"{said}: shortened ({over_length})."


def _at(place: str, column: str, function, *args):
    try:
        result = function(*args)
    except ValueError as error:
        raise ValueError(f"{place}, column {column!r}: {error}") from error
    if not result:
        raise ValueError(f"{place}, column {column!r}: the prompt is empty.")
    return result


class GlobalBatches(Sampler[list[int]]):
    """Batches of row numbers, the same on every rank but for the part each rank takes; a fresh order every epoch.

    Iterating goes through one epoch; the next one continues with the next epoch's order. The last batch of an epoch
    holds what is left over. Where a batch does not divide, the first ranks get one prompt more.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int, rank: int, world_size: int):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        for batch in torch.randperm(self.num_rows, generator=generator).split(self.batch_size):
            yield batch.tensor_split(self.world_size)[self.rank].tolist()


def create_prompt_dataloader(
    args, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> tuple[DataLoader, int]:
    """(dataloader, num_total_iters) of a PPO run; see `create_datasets`."""
    data = args.data
    source = load_source(data.train, subset=data.train_subset, split=data.train_split, max_samples=data.max_samples)
    column = source.column(data.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
    dataset = PromptDataset(source, column, tokenizer)
    message = dataset.limit_length(data.max_prompt_tokens, data.over_length)
    if message is not None and rank == 0:
        print(message, flush=True)
    batches = GlobalBatches(len(dataset), args.prompts_per_iteration, seed=args.seed, rank=rank, world_size=world_size)
    dataloader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.batch)
    return dataloader, args.num_iterations or args.num_train_epochs * len(dataloader)
