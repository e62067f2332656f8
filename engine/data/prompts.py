"""Prompts for PPO: rows -> token ids -> this rank's share of every iteration's batch.

The order of prompts depends on the seed alone, never on the number of ranks: iteration i draws the same prompts on one
rank and on sixty-four, and rank r takes the r-th contiguous part of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from engine.data.batches import GlobalBatches, in_batches
from engine.data.cache import digest_of, digest_of_tokenizer, kept_tensors
from engine.data.exchanges import OverLength, check_end_can_go, shortened_prompt
from engine.data.formatting import Prompt, as_prompt, encode, encode_reply, is_answered, render, unanswered
from engine.data.sources import PROMPT_COLUMNS, Source, at, load_source, mixed_rows, mixture


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This rank's prompts of one iteration, in dataset terms.

    Attributes:
        prompts: as the dataset has them, text or messages.
        tokens: one list of token ids per prompt.
        texts: the same prompts as the model sees them.
        ids: each prompt's row number in the dataset; with the seed and the iteration it keys the sampling noise.
        columns: the dataset's columns, a list per column, for score functions.
    """

    prompts: list[Prompt]
    tokens: list[list[int]]
    texts: list[str]
    ids: list[int]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.ids)

    def repeated(self, times: int) -> "PromptBatch":
        """Every prompt `times` times in a row."""
        rows = [row for row in range(len(self)) for _ in range(times)]
        lists = {f.name: [getattr(self, f.name)[row] for row in rows] for f in fields(self) if f.name != "columns"}
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return PromptBatch(**lists, columns=columns)


class PromptDataset(Dataset):
    """Tokenised prompts with the columns they came with. An item is its own row number: batches are made by `batch`."""

    def __init__(
        self,
        sources: list[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_column: str | None = None,
        prompt_format: Literal["text", "chat"] = "text",
    ):
        """
        Args:
            prompt_column: of all sources; found by name in each when not given.
            prompt_format: see `engine.data.formatting.as_prompt`.

        Raises:
            ValueError: names the place of a prompt that cannot be rendered or has no tokens.
        """
        self.tokenizer = tokenizer
        self.name = ", ".join(source.name for source in sources)
        self.sizes = [len(source.rows) for source in sources]
        self.rows = [row for source in sources for row in source.rows]
        self.columns = list(dict.fromkeys(name for source in sources for name in source.columns))
        cells, self.places = [], []
        for source in sources:
            column = source.column(prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
            cells += source.prompts(column, prompt_column)
            self.places += [f"{place}, column {column!r}" for place in source.places]
        self.num_answered = sum(map(is_answered, cells))
        self.prompts = [
            at(place, as_prompt, at(place, unanswered, cell), prompt_format)
            for cell, place in zip(cells, self.places, strict=True)
        ]
        self.texts = [
            at(place, render, prompt, tokenizer) for prompt, place in zip(self.prompts, self.places, strict=True)
        ]
        self.tokens = self._tokens()
        self.kept = list(range(len(self.tokens)))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> int:
        return self.kept[index]

    def batch(self, rows: list[int]) -> PromptBatch:
        return PromptBatch(
            prompts=[self.prompts[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ids=list(rows),
            columns={name: [self.rows[row].get(name) for row in rows] for name in self.columns},
        )

    @property
    def digest(self) -> str:
        """Of the prompts in use: what ranks compare."""
        return digest_of([self.tokens[row] for row in self.kept])

    @property
    def columns_digest(self) -> str:
        """Of what they came with, which score functions and environments read."""
        return digest_of([self.rows[row] for row in self.kept])

    def check_can_go_on(self) -> None:
        """
        Raises:
            ValueError: names the place of a prompt that is no conversation, or whose chat template has no way to write
                a reply to a response.
        """
        for prompt, place in zip(self.prompts, self.places, strict=True):
            if isinstance(prompt, str):
                raise ValueError(
                    f"{place}: the prompt is text, and with rollout.environment it has to be a conversation: a list of "
                    f'{{"role", "content"}} messages, or what the user says with --data.prompt_format chat.'
                )
        answered = [*self.prompts[0], {"role": "assistant", "content": "yes"}]
        at(self.places[0], encode_reply, answered, "no", self.tokenizer, [self.tokenizer.eos_token_id])

    def kept_of_each_source(self) -> list[int]:
        """How many rows of each source are in use."""
        bounds = torch.tensor(self.sizes).cumsum(0)
        sources = torch.bucketize(torch.tensor(self.kept), bounds, right=True)
        return torch.bincount(sources, minlength=len(self.sizes)).tolist()

    def answers_cut(self) -> str | None:
        """What to tell the user of conversations that came with their answer; None when there was none."""
        if self.num_answered == 0:
            return None
        return (
            f"{self.num_answered} of {len(self.prompts)} prompts of {self.name} end with the assistant's turn: it is "
            f"cut off, the actor answers."
        )

    def limit_length(self, max_prompt_tokens: int, over_length: OverLength) -> str | None:
        """Apply the over-length policy. Returns what to tell the user, or None when no prompt was too long.

        Raises:
            ValueError: the policy is `error`, `drop` leaves nothing, or `truncate_right` meets a conversation.
        """
        too_long = [row for row in self.kept if len(self.tokens[row]) > max_prompt_tokens]
        if not too_long:
            return None
        said = f"{len(too_long)} of {len(self.kept)} prompts of {self.name} exceed {max_prompt_tokens} tokens"
        if over_length == "error":
            raise ValueError(f"{said}, first at {self.places[too_long[0]]}. Raise --data.max_prompt_tokens.")
        if over_length == "drop":
            self.kept = sorted(set(self.kept) - set(too_long))
            if not self.kept:
                raise ValueError(f"{said}: dropping them leaves nothing. Raise --data.max_prompt_tokens.")
            return f"{said}: dropped."
        for row in too_long:
            at(self.places[row], check_end_can_go, self.prompts[row], over_length)
            self._shorten(row, max_prompt_tokens, over_length)
        return f"{said}: shortened ({over_length})."

    def _shorten(self, row: int, max_prompt_tokens: int, over_length: OverLength) -> None:
        bos, mark = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        # A text has the mark of its beginning where a template wrote it, not where the tokenizer adds it.
        added = self.tokens[row][0] == bos and not self.texts[row].startswith(mark)
        ids = shortened_prompt(self.tokens[row], max_prompt_tokens, over_length, bos_token_id=bos)
        self.tokens[row], self.texts[row] = ids, self.tokenizer.decode(ids[1:] if added else ids)

    def _tokens(self) -> list[list[int]]:
        def made() -> dict[str, torch.Tensor]:
            ids = [at(place, encode, text, self.tokenizer) for place, text in zip(self.places, self.texts, strict=True)]
            flat = [token for row in ids for token in row]
            return {"tokens": torch.tensor(flat, dtype=torch.int64), "lengths": torch.tensor([len(row) for row in ids])}

        kept = kept_tensors(["prompts", self.texts, digest_of_tokenizer(self.tokenizer)], made)
        rows = [row.tolist() for row in kept["tokens"].split(kept["lengths"].tolist())]
        for row, place in zip(rows, self.places, strict=True):
            if not row:
                raise ValueError(f"{place}: the prompt has no tokens.")
        return rows


def create_prompt_dataloader(
    args, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> tuple[DataLoader, int]:
    """(dataloader, num_total_iters) of a PPO run; see `create_datasets`.

    Raises:
        ValueError: names file and line of a row that is not a prompt.
    """
    data = args.data
    options = dict(subset=data.train_subset, split=data.train_split, max_samples=data.max_samples)
    dataset, said = _loaded([load_source(name, **options) for name in data.sources], args, tokenizer)
    if data.weights is not None:
        sizes = dataset.kept_of_each_source()
        rows = mixed_rows(sizes, data.weights, seed=args.seed)
        said += mixture(data.sources, sizes, rows)
        dataset.kept = [dataset.kept[row] for row in rows]
    if len(dataset) < args.prompts_per_iteration:
        said.append(
            f"{len(dataset)} prompts are fewer than the {args.prompts_per_iteration} of an iteration "
            f"(rollout_batch_size / rollout.samples_per_prompt): every iteration takes all of them, once."
        )
    for line in said if rank == 0 else []:
        print(line, flush=True)
    batches = GlobalBatches(len(dataset), args.prompts_per_iteration, seed=args.seed, rank=rank, world_size=world_size)
    dataloader = in_batches(dataset, batches, dataset.batch)
    return dataloader, args.num_iterations or args.num_train_epochs * len(dataloader)


def load_held_out_prompts(args, tokenizer: PreTrainedTokenizerBase, *, say: Callable[[str], None]) -> PromptDataset:
    """The prompts of `data.eval`, as many as `evaluation.num_prompts` allows.

    Args:
        say: called with each line that the user should read.

    Raises:
        ValueError: names file and line of a row that is not a prompt.
    """
    data, most = args.data, args.evaluation.num_prompts
    source = load_source(data.eval, subset=data.train_subset, split=data.eval_split, max_samples=most)
    dataset, said = _loaded([source], args, tokenizer)
    for line in said:
        say(line)
    return dataset


def _loaded(sources: list[Source], args, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptDataset, list[str]]:
    """(prompts of fitting lengths, what to tell the user)."""
    data = args.data
    dataset = PromptDataset(sources, tokenizer, prompt_column=data.prompt_column, prompt_format=data.prompt_format)
    if args.rollout.environment is not None:
        dataset.check_can_go_on()
    said = [dataset.answers_cut(), dataset.limit_length(data.max_prompt_tokens, data.over_length)]
    return dataset, [line for line in said if line is not None]
