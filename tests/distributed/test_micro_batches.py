"""micro_batches.py on real ranks: every row once, pairs kept together, all ranks in step."""

import pytest
import torch

from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.micro_batches import marking_last, my_micro_batches, one_number_per_row


def sequences(count: int, seed: int = 0) -> Sequences:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (2, count), generator=rng).tolist()
    return Sequences.of(*([[100 * row + 1] * length for row, length in enumerate(part)] for part in lengths))


def dealt(count, token_budget, rows_together, packed):
    """This rank's micro-batches: their rows, the shape of their input, and whether they are packed."""
    given = dict(token_budget=token_budget, rows_together=rows_together, packed=packed)
    return [
        (batch.rows.tolist(), tuple(batch.input_ids.shape), batch.position_ids is not None)
        for batch in my_micro_batches(sequences(count), **given)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_together", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_are_dealt_out(run_ranks, world_size, rows_together, packed):
    count, budget, lengths = 24, 180, sequences(24).lengths.tolist()
    ranks = run_ranks(dealt, count, budget, rows_together, packed, world_size=world_size)
    assert len({len(rank) for rank in ranks}) == 1 < len(ranks[0]), "equally many forward passes"
    assert sorted(row for rank in ranks for rows, *_ in rank for row in rows) == list(range(count))
    assert any(len(rows) > rows_together for rank in ranks for rows, *_ in rank), "several share a forward pass"
    for rows, shape, is_packed in (batch for rank in ranks for batch in rank if batch[0]):
        groups = [rows[start : start + rows_together] for start in range(0, len(rows), rows_together)]
        for group in groups:
            assert group == list(range(group[0], group[0] + rows_together)) and group[0] % rows_together == 0
        sizes = [lengths[row] for row in rows]
        assert shape == ((1, sum(sizes)) if packed else (len(rows), max(sizes)))
        assert is_packed == packed
        assert shape[0] * shape[1] <= budget


@pytest.mark.parametrize("packed", [False, True])
def test_a_pair_longer_than_the_budget_still_stays_together(run_ranks, packed):
    for rank in run_ranks(dealt, 4, 1, 2, packed):
        assert [rows in ([0, 1], [2, 3]) for rows, *_ in rank] == [True]


@pytest.mark.parametrize("packed", [False, True])
def test_fewer_pairs_than_ranks_leave_the_other_rank_an_empty_pass(run_ranks, packed):
    passes = run_ranks(dealt, 2, 1000, 2, packed)
    assert sorted(rows for ((rows, *_),) in passes) == [[], [0, 1]]
    assert [shape for ((rows, shape, _),) in passes if not rows] == [(1, 1)]


def numbered(count, packed):
    """Ten times the row's first token plus its length, asked for without gradients; and the passes it took."""
    passes = []

    def number(batch):
        assert not torch.is_grad_enabled()
        passes.append(batch.rows.tolist())
        first = batch.last_positions - sequences(count).lengths[batch.rows] + 1
        return 10 * batch.input_ids.flatten()[first].float() + sequences(count).lengths[batch.rows]

    return one_number_per_row(number, sequences(count), token_budget=60, packed=packed), passes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("count", [1, 7])
def test_one_number_per_row_is_the_same_everywhere(run_ranks, count, world_size, packed):
    wanted = [10.0 * (100 * row + 1) + length for row, length in enumerate(sequences(count).lengths.tolist())]
    answers = run_ranks(numbered, count, packed, world_size=world_size)
    for numbers, _ in answers:
        assert numbers.tolist() == wanted
        assert numbers.dtype == torch.float32 and numbers.device.type == "cpu"
    asked = sorted(row for _, passes in answers for rows in passes for row in rows)
    assert asked == list(range(count)), "by one rank each"


def nan_of_rank_one():
    return one_number_per_row(
        lambda batch: torch.full((len(batch.rows),), torch.nan if comm.rank() == 1 else 1.0),
        sequences(4),
        token_budget=60,
    )


def test_nan_on_one_rank_is_nan_on_all(run_ranks):
    first, second = run_ranks(nan_of_rank_one)
    assert torch.equal(first.isnan(), second.isnan()) and 0 < first.isnan().sum() < 4


def test_the_last_one_is_marked():
    assert list(marking_last(iter("abc"))) == [("a", False), ("b", False), ("c", True)]
    assert list(marking_last([])) == []
