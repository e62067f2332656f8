"""What SFT, reward model and DPO learn from: demonstrations (one response) and preferences (two)."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from engine.data.batches import GlobalBatches, in_batches
from engine.data.cache import digest_of
from engine.data.columns import Found, Reader
from engine.data.exchanges import LengthLimit, check_end_can_go, concatenated, rows_of, tokenised
from engine.data.sequences import Sequences
from engine.data.sources import at, load_source, mixed_rows, mixture, split_rows


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
    dataloader = in_batches(numbers, batches, numbers.batch)
    return dataloader, args.num_iterations or args.num_train_epochs * len(dataloader)


def load_examples(
    data, tokenizer: PreTrainedTokenizerBase, read: Reader, *, seed: int, say: Callable[[str], None]
) -> tuple[Examples, Examples | None]:
    """(train, held out or None).

    Args:
        data: the sources, their columns, and limits; see `engine.config.data`.
        read: `demonstrations` or `preferences`, of `engine.data.columns`.
        say: called with each line that the user should read.

    Raises:
        ValueError: as `read`, or all that is held out is trained on.
    """
    parts = [_loaded(name, data.train_split, data, tokenizer, read, say) for name in data.sources]
    rows = mixed_rows([len(part) for part in parts], data.weights, seed=seed)
    for line in mixture(data.sources, [len(part) for part in parts], rows) if data.weights is not None else []:
        say(line)
    train = Examples(
        sequences=concatenated([part.sequences for part in parts]),
        rows_per_example=parts[0].rows_per_example,
        margins=torch.cat([part.margins for part in parts]),
    )[torch.tensor(rows)]
    if data.eval is not None:
        held_out = _loaded(data.eval, data.eval_split, data, tokenizer, read, say)
        _check_apart(train, held_out, data.eval, say)
        return train, held_out
    if data.eval_fraction > 0:
        return _split_by_prompt(train, data.eval_fraction, seed=seed)
    return train, None


def load_held_out(
    data, tokenizer: PreTrainedTokenizerBase, read: Reader, *, seed: int, say: Callable[[str], None]
) -> Examples | None:
    """What `load_examples` holds out, without reading more than that takes."""
    if data.eval is not None:
        return _loaded(data.eval, data.eval_split, data, tokenizer, read, say)
    if data.eval_fraction > 0:
        return load_examples(data, tokenizer, read, seed=seed, say=say)[1]
    return None


def learned_whole(examples: Examples) -> Examples:
    """Everything that has a token before it to be predicted from counts as the response."""
    sequences = examples.sequences
    ones = torch.ones_like(sequences.prompt_lengths)
    whole = Sequences(tokens=sequences.tokens, prompt_lengths=ones, response_lengths=sequences.lengths - 1)
    return replace(examples, sequences=whole)


def _loaded(name: str, split: str, data, tokenizer, read: Reader, say) -> Examples:
    source = load_source(name, subset=data.train_subset, split=split, max_samples=data.max_samples)
    found = read(source, data)
    one_prompt = [all(prompt == example[0][0] for prompt, _ in example) for example in found.exchanges]
    found = found[_wanted(one_prompt, name, "answer two different prompts", say)]
    rows_per_example = len(found.exchanges[0])
    examples = Examples(
        sequences=tokenised(
            [one for example in found.exchanges for one in example],
            [place for place in found.places for _ in range(rows_per_example)],
            tokenizer,
        ),
        rows_per_example=rows_per_example,
        margins=torch.tensor(found.margins, dtype=torch.float32),
    )
    limit = LengthLimit(
        max_prompt_tokens=data.max_prompt_tokens, max_length=data.max_length, over_length=data.over_length
    )
    examples = _within(limit, examples, found, tokenizer.bos_token_id, say)
    if rows_per_example == 1:
        return examples
    differ = [chosen != rejected for chosen, rejected in _rows_by_example(examples)]
    return examples[torch.tensor(_wanted(differ, name, "have chosen == rejected", say))]


def _rows_by_example(examples: Examples) -> list[tuple]:
    """Of each example a (prompt, response) per row, as bytes: quick to compare, and small."""
    rows = [tuple(array("q", ids).tobytes() for ids in row) for row in rows_of(examples.sequences)]
    each = examples.rows_per_example
    return [tuple(rows[start : start + each]) for start in range(0, len(rows), each)]


def _check_apart(train: Examples, held_out: Examples, name: str, say) -> None:
    """How much of what is held out is trained on."""
    ours, theirs = _rows_by_example(train), _rows_by_example(held_out)
    if set(theirs) <= set(ours):
        raise ValueError(
            f"data.eval={name}: all of its {len(theirs)} rows are among those trained on, so that nothing is held out. "
            f"Name another file, or split some off with --data.eval_fraction."
        )
    asked, also_asked = {rows[0][0] for rows in ours}, {rows[0][0] for rows in theirs}
    if number := len(also_asked & asked):
        say(f"Warning: {number} of {len(also_asked)} prompts of {name} (data.eval) are among those trained on.")


def _split_by_prompt(examples: Examples, fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """What is held out asks nothing that is trained on: all examples of a prompt fall on one side."""
    prompts = [rows[0][0] for rows in _rows_by_example(examples)]
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    _, held_out = split_rows(len(number), fraction, seed=seed)
    is_held_out = torch.zeros(len(number), dtype=torch.bool)
    is_held_out[held_out] = True
    chosen = is_held_out[torch.tensor([number[prompt] for prompt in prompts])]
    return examples[(~chosen).nonzero().squeeze(1)], examples[chosen.nonzero().squeeze(1)]


def _wanted(wanted: list[bool], name: str, flaw: str, say) -> list[int]:
    """Which pairs are wanted; the others are dropped and counted."""
    if not all(wanted):
        said = f"{len(wanted) - sum(wanted)} of {len(wanted)} pairs of {name} {flaw}"
        if not any(wanted):
            raise ValueError(f"{said}: nothing can be learned from them.")
        say(f"{said}: dropped.")
    return [number for number, one in enumerate(wanted) if one]


def _within(limit: LengthLimit, examples: Examples, found: Found, bos_token_id: int | None, say) -> Examples:
    sequences, rows = examples.sequences, examples.rows_per_example
    too_long = limit.too_long(sequences).view(-1, rows).any(1)
    number = int(too_long.sum())
    if number == 0:
        return examples
    said = (
        f"{number} of {len(examples)} {'rows' if rows == 1 else 'pairs'} of {found.name} exceed "
        f"data.max_prompt_tokens={limit.max_prompt_tokens} or data.max_length={limit.max_length}"
    )
    if limit.over_length == "error":
        raise ValueError(f"{said}, first at {found.places[int(too_long.nonzero()[0])]}.")
    if limit.over_length == "drop":
        if number == len(examples):
            raise ValueError(f"{said}: dropping them leaves nothing. Raise the limit.")
        say(f"{said}: dropped.")
        return examples[(~too_long).nonzero().squeeze(1)]
    for example in (sequences.prompt_lengths[::rows] > limit.prompt_room).nonzero().squeeze(1).tolist():
        at(found.places[example], check_end_can_go, found.exchanges[example][0][0], limit.over_length)
    say(f"{said}: shortened ({limit.over_length}).")
    return replace(examples, sequences=limit.shortened(sequences, rows_per_example=rows, bos_token_id=bos_token_id))
