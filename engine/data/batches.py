"""The order of a training set's rows: from the seed alone, never from the number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = TypeVar("Batch")


class GlobalBatches(Sampler[list[int]]):
    """Batches of row numbers, the same on every rank but for the part each rank takes; a fresh order every epoch.

    Iterating goes through one epoch; the next one continues with the next epoch's order. The last batch of an epoch
    holds what is left over. Where a batch does not divide, the first ranks get one row more. One rank of one takes
    the whole batch.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        for batch in torch.randperm(self.num_rows, generator=generator).split(self.batch_size):
            yield batch.tensor_split(self.world_size)[self.rank].tolist()


def in_batches(rows: Dataset, batches: GlobalBatches, collate: Callable[[list], Batch]) -> DataLoader:
    """What goes through a data set in these batches.

    A DataLoader draws a number whenever it is gone through: from a generator of its own here, or a run that goes on in
    the middle of an epoch would draw once more than the one that never stopped, and dropout would be another.
    """
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate, generator=torch.Generator())


class Endless(Iterator[Batch]):
    """Batches, epoch after epoch.

    Attributes:
        drawn: how many batches there have been.
    """

    def __init__(self, batches: Iterable[Batch], *, drawn: int | None = None):
        """
        Args:
            batches: something that can be gone through again and again.
            drawn: go on as if there had been so many, in the order that they come in from the first on; needs a
                `DataLoader`, or batches that are the same every epoch. Just go on with them when not given.
        """
        self.batches, self.drawn = batches, drawn or 0
        if drawn is not None and isinstance(order := getattr(batches, "batch_sampler", None), GlobalBatches):
            order.epoch = drawn // len(batches)
        self.epoch = self._epochs()

    def __next__(self) -> Batch:
        """
        Raises:
            ValueError: there was nothing to go through, or nothing any more.
        """
        batch = next(self.epoch)
        self.drawn += 1
        return batch

    def _epochs(self) -> Iterator[Batch]:
        skipped = self.drawn % len(self.batches) if self.drawn else 0
        while True:
            empty = True
            for number, batch in enumerate(self.batches):
                empty = False
                if number >= skipped:
                    yield batch
            if empty:
                raise ValueError(
                    "The batches came to their end. Pass something that can be gone through again and again."
                )
            skipped = 0
