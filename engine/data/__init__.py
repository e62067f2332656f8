"""Files and hub names -> tokenised rows -> batches."""

import os

from engine.data.prompts import PromptBatch, create_prompt_dataloader

__all__ = ["PromptBatch", "create_datasets"]


def create_datasets(args, tokenizer, train_phase):
    """The batches of a training phase.

    Args:
        args: the run's config.
        tokenizer: the model's.
        train_phase: 3, the prompts of PPO.

    Returns:
        (dataloader, num_total_iters): the dataloader yields this rank's share of every batch.

    Raises:
        ValueError: another phase, or data that does not fit (see `engine.data.sources`).
    """
    if train_phase != 3:
        raise ValueError(f"train_phase={train_phase}: only phase 3 (prompts for PPO) exists.")
    # Layer 1 knows nothing of process groups; the launcher's variables say which share is this rank's.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return create_prompt_dataloader(args, tokenizer, rank=rank, world_size=world_size)
