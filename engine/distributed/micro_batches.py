"""Each rank's share of some rows, as forward passes that all ranks run equally many of."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from engine.data.sequences import MicroBatch, Sequences, plan_micro_batches
from engine.distributed import comm

Item = TypeVar("Item")


def my_micro_batches(
    sequences: Sequences, *, token_budget: int, rows_together: int = 1, packed: bool = False
) -> Iterator[MicroBatch]:
    """This rank's share of the rows, in as many micro-batches as every other rank's.

    Args:
        sequences: the same on every rank.
        token_budget: tokens per forward pass, padding included.
        rows_together: so many neighbouring rows (a pair, say) stay in one micro-batch.
        packed: rows lie one after another in place of being padded to the longest.
    """
    together = sequences.lengths.view(-1, rows_together)
    lengths = together.sum(1) if packed else rows_together * together.amax(1)
    plan = plan_micro_batches(lengths, token_budget=token_budget, num_ranks=comm.world_size(), packed=packed)
    lay_out = sequences.packed if packed else sequences.padded
    for groups in plan[comm.rank()]:
        yield lay_out((groups[:, None] * rows_together + torch.arange(rows_together)).flatten(), comm.device())


def one_number_per_row(
    number: Callable[[MicroBatch], Tensor],
    sequences: Sequences,
    *,
    token_budget: int,
    rows_together: int = 1,
    packed: bool = False,
) -> Tensor:
    """(B,) fp32 on the CPU, the same on every rank: `number(batch)` of every row, without gradients. A collective.

    Args:
        number: returns (rows,) of a micro-batch.
        token_budget, rows_together, packed: as for `my_micro_batches`.
    """
    numbers = torch.zeros(len(sequences), device=comm.device())
    given = dict(token_budget=token_budget, rows_together=rows_together, packed=packed)
    with torch.no_grad():
        for batch in my_micro_batches(sequences, **given):
            numbers[batch.rows] = number(batch)
    return comm.sum_over_ranks(numbers).cpu()


def marking_last(batches: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether it is the last."""
    batches = list(batches)
    for number, batch in enumerate(batches, start=1):
        yield batch, number == len(batches)
