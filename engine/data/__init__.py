"""Files and hub names -> tokenised rows -> batches."""

import os

from torch.utils.data import DataLoader

from engine.data.examples import Examples, create_example_dataloader, load_demonstrations, load_preferences
from engine.data.prompts import PromptBatch, create_prompt_dataloader

__all__ = ["Examples", "PromptBatch", "create_datasets", "create_eval_dataset"]

LOADERS = {1: load_demonstrations, 2: load_preferences}


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
    train, _ = _loader(train_phase)(args, tokenizer, _aloud if rank == 0 else _silently)
    return create_example_dataloader(args, train)


def create_eval_dataset(args, tokenizer, train_phase: int) -> Examples | None:
    """What phase 1 or 2 holds out, by `data.eval` or `data.eval_fraction`; None when neither is set."""
    _, held_out = _loader(train_phase)(args, tokenizer, _silently)
    return held_out


def _loader(train_phase: int):
    if train_phase not in LOADERS:
        raise ValueError(f"train_phase={train_phase} is not 1 (SFT), 2 (preferences) or 3 (prompts for PPO).")
    return LOADERS[train_phase]


def _aloud(line: str) -> None:
    print(line, flush=True)


def _silently(line: str) -> None:
    del line
