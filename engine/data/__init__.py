"""Files and hub names -> tokenised rows -> batches."""

import os

from torch.utils.data import DataLoader

from engine.data.columns import demonstrations, preferences
from engine.data.examples import Examples, create_example_dataloader, learned_whole, load_examples, load_held_out
from engine.data.prompts import PromptBatch, PromptDataset, create_prompt_dataloader, load_held_out_prompts

__all__ = [
    "Examples",
    "PromptBatch",
    "PromptDataset",
    "create_datasets",
    "create_eval_dataset",
    "create_pretraining_dataset",
]

READERS = {1: demonstrations, 2: preferences}


def create_datasets(args, tokenizer, train_phase: int) -> tuple[DataLoader, int]:
    """The batches of a training phase.

    Args:
        args: the run's config.
        tokenizer: the model's.
        train_phase: 1, the demonstrations of SFT; 2, the preferences of a reward model or DPO; 3, the prompts of PPO.

    Returns:
        (dataloader, num_total_iters). Of phases 1 and 2 the dataloader yields the minibatches of all ranks, the same
        on every rank (`Examples`), and num_total_iters counts optimizer steps; of phase 3 it yields this rank's share
        of every iteration's prompts (`PromptBatch`), and num_total_iters counts iterations.

    Raises:
        ValueError: another phase, or data that does not fit (see `engine.data.sources`).
    """
    # Layer 1 knows nothing of process groups; the launcher's variables say which share is this rank's.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if train_phase == 3:
        return create_prompt_dataloader(args, tokenizer, rank=rank, world_size=world_size)
    say = _aloud if rank == 0 else _silently
    train, _ = load_examples(args.data, tokenizer, _reader(train_phase), seed=args.seed, say=say)
    return create_example_dataloader(args, _learned(train, args, train_phase))


def create_eval_dataset(args, tokenizer, train_phase: int) -> Examples | PromptDataset | None:
    """What is held out, by `data.eval` or, in phases 1 and 2, `data.eval_fraction`; None when neither is set."""
    if train_phase == 3:
        say = _aloud if int(os.environ.get("RANK", 0)) == 0 else _silently
        return None if args.data.eval is None else load_held_out_prompts(args, tokenizer, say=say)
    held_out = load_held_out(args.data, tokenizer, _reader(train_phase), seed=args.seed, say=_silently)
    return None if held_out is None else _learned(held_out, args, train_phase)


def create_pretraining_dataset(args, tokenizer) -> DataLoader | None:
    """The minibatches of demonstrations that PPO learns beside its own loss (`args.pretraining`); None without any."""
    mix = args.pretraining
    if mix is None:
        return None
    train, _ = load_examples(mix.data, tokenizer, demonstrations, seed=args.seed, say=_silently)
    dataloader, _ = create_example_dataloader(args, learned_whole(train) if mix.loss_on == "sequence" else train)
    return dataloader


def _reader(train_phase: int):
    if train_phase not in READERS:
        raise ValueError(f"train_phase={train_phase} is not 1 (SFT), 2 (preferences) or 3 (prompts for PPO).")
    return READERS[train_phase]


def _learned(examples: Examples, args, train_phase: int) -> Examples:
    return learned_whole(examples) if train_phase == 1 and args.loss_on == "sequence" else examples


def _aloud(line: str) -> None:
    print(line, flush=True)


def _silently(line: str) -> None:
    del line
