"""sequences.py against slow Python: lists of lists in place of flat tensors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.sequences import Sequences, cut_by_length, plan_micro_batches, ragged_index

# (prompt, response) lengths; responses of 0, 1 and many tokens
LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=9)


def token_lists(lengths):
    """Distinct tokens, so that a misplaced one is seen: 1000 x row + 100 x part + column."""
    prompts = [[1000 * row + column + 1 for column in range(prompt)] for row, (prompt, _) in enumerate(lengths)]
    responses = [[1000 * row + 100 + column for column in range(response)] for row, (_, response) in enumerate(lengths)]
    return prompts, responses


def sequences(lengths) -> Sequences:
    return Sequences.of(*token_lists(lengths))


def same(one: Sequences, other: Sequences) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("tokens", "prompt_lengths", "response_lengths")
    )


# ragged_index


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_ragged_index_picks_rows_of_a_flat_tensor(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    flat = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
    index = ragged_index(torch.tensor(lengths), torch.tensor(rows, dtype=torch.int64))
    assert index.dtype == torch.int64
    assert [flat[at] for at in index.tolist()] == [(row, column) for row in rows for column in range(lengths[row])]


# Sequences


def test_rows_are_kept_flat_prompt_before_response():
    both = Sequences.of([[5, 6], [7]], [[8], [9, 10]])
    assert both.tokens.tolist() == [5, 6, 8, 7, 9, 10]
    assert (both.prompt_lengths.tolist(), both.response_lengths.tolist()) == ([2, 1], [1, 2])
    assert (len(both), both.num_response_tokens, both.lengths.tolist()) == (2, 3, [3, 3])


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(ValueError, match="shorter"):
        Sequences.of([[1], [2]], [[3]])


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.data())
def test_picking_rows(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    prompts, responses = token_lists(lengths)
    picked = sequences(lengths)[torch.tensor(rows, dtype=torch.int64)]
    assert same(picked, Sequences.of([prompts[row] for row in rows], [responses[row] for row in rows]))


def test_no_rows_at_all():
    nothing = Sequences.of([], [])
    assert (len(nothing), nothing.num_response_tokens, nothing.tokens.dtype) == (0, 0, torch.int64)
    assert same(sequences([(2, 1)])[torch.empty(0, dtype=torch.int64)], nothing)


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        (dict(tokens=[1, 2, 3], prompt_lengths=[1, 1], response_lengths=[1]), r"Sequences\.response_lengths"),
        (dict(tokens=[1, 2, 3], prompt_lengths=[1], response_lengths=[1]), r"Sequences\.tokens has 3 tokens.*2"),
        (dict(tokens=[1], prompt_lengths=[1], response_lengths=[1]), r"Sequences\.tokens has 1"),
        (dict(tokens=[1, 2], prompt_lengths=[2, 0], response_lengths=[0, 0]), r"Sequences\.prompt_lengths"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(given_, named):
    with pytest.raises(ValueError, match=named):
        Sequences(**{name: torch.tensor(values) for name, values in given_.items()})


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        Sequences.of([[1], []], [[2], [3]])


# One model input


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.data())
def test_padded_rows_against_loops(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6, unique=True))
    prompts, responses = token_lists(lengths)
    batch = sequences(lengths).padded(torch.tensor(rows), torch.device("cpu"))
    whole = [prompts[row] + responses[row] for row in rows]
    width = max(map(len, whole))
    assert batch.input_ids.shape == (len(rows), width)
    for line, row in enumerate(whole):
        assert batch.input_ids[line, : len(row)].tolist() == row
        assert batch.input_ids.flatten()[batch.last_positions[line]] == row[-1]
    assert [response for row in rows for response in responses[row]] == batch.targets.tolist()
    before = [token for row, line in zip(rows, whole, strict=True) for token in line[len(prompts[row]) - 1 : -1]]
    assert batch.input_ids.flatten()[batch.positions].tolist() == before
    # ... and it is the right row's state, not one that happens to hold the same token
    lines = [line for line, row in enumerate(rows) for _ in responses[row]]
    assert (batch.positions // width).tolist() == lines
    flat = [token for response in responses for token in response]
    assert [flat[at] for at in batch.response_tokens.tolist()] == batch.targets.tolist()
    assert batch.rows.tolist() == rows


def test_padded_rows_by_hand():
    batch = Sequences.of([[5, 6], [7]], [[8], [9, 10, 11]]).padded(torch.tensor([1, 0]), torch.device("cpu"))
    assert batch.input_ids[0].tolist() == [7, 9, 10, 11]
    assert batch.input_ids[1, :3].tolist() == [5, 6, 8]
    assert batch.positions.tolist() == [0, 1, 2, 5]
    assert batch.targets.tolist() == [9, 10, 11, 8]
    assert batch.last_positions.tolist() == [3, 6]
    assert batch.response_tokens.tolist() == [1, 2, 3, 0]


def test_an_empty_micro_batch_is_one_row_of_one_token():
    batch = sequences([(2, 3)]).padded(torch.empty(0, dtype=torch.int64), torch.device("cpu"))
    assert batch.input_ids.shape == (1, 1)
    for name in ("positions", "targets", "last_positions", "rows", "response_tokens"):
        assert getattr(batch, name).shape == (0,) and getattr(batch, name).dtype == torch.int64


def test_rows_whose_responses_are_all_empty():
    batch = sequences([(2, 0), (4, 0)]).padded(torch.tensor([0, 1]), torch.device("cpu"))
    assert batch.input_ids.shape == (2, 4) and len(batch.positions) == 0
    assert batch.last_positions.tolist() == [1, 7]


# Packed into one row

CPU = torch.device("cpu")


def test_packed_rows_by_hand():
    batch = Sequences.of([[5, 6], [7]], [[8], [9, 10, 11]]).packed(torch.tensor([1, 0]), CPU)
    assert batch.input_ids.tolist() == [[7, 9, 10, 11, 5, 6, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.positions.tolist() == [0, 1, 2, 5]
    assert batch.targets.tolist() == [9, 10, 11, 8]
    assert batch.target_rows.tolist() == [0, 0, 0, 1]
    assert batch.last_positions.tolist() == [3, 6]
    assert batch.rows.tolist() == [1, 0]
    assert batch.response_tokens.tolist() == [1, 2, 3, 0]


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.data())
def test_packed_rows_are_the_padded_ones_without_the_padding(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6, unique=True))
    prompts, responses = token_lists(lengths)
    one, other = (
        lay_out(torch.tensor(rows), CPU) for lay_out in (sequences(lengths).packed, sequences(lengths).padded)
    )
    for name in ("targets", "target_rows", "rows", "response_tokens"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    whole = [prompts[row] + responses[row] for row in rows]
    assert one.input_ids.tolist() == [list(itertools.chain.from_iterable(whole))]
    assert one.position_ids.tolist() == [[column for row in whole for column in range(len(row))]]
    assert other.position_ids is None
    for positions in ("positions", "last_positions"):  # the same tokens' states, which tell rows and columns apart
        at_one, at_other = getattr(one, positions), getattr(other, positions)
        assert one.input_ids.flatten()[at_one].tolist() == other.input_ids.flatten()[at_other].tolist()
        assert one.position_ids.flatten()[at_one].tolist() == (at_other % other.input_ids.shape[1]).tolist()


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.data())
def test_target_rows_count_the_rows_of_the_micro_batch(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6, unique=True))
    for lay_out in (sequences(lengths).packed, sequences(lengths).padded):
        batch = lay_out(torch.tensor(rows, dtype=torch.int64), CPU)
        assert batch.target_rows.tolist() == [line for line, row in enumerate(rows) for _ in range(lengths[row][1])]


def test_nothing_packed_is_one_row_of_one_token():
    batch = sequences([(2, 3)]).packed(torch.empty(0, dtype=torch.int64), CPU)
    assert batch.input_ids.tolist() == [[0]] and batch.position_ids is None
    for name in ("positions", "targets", "target_rows", "last_positions", "rows", "response_tokens"):
        assert getattr(batch, name).shape == (0,) and getattr(batch, name).dtype == torch.int64


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.data())
def test_sums_by_row_against_a_loop(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6, unique=True))
    for lay_out in (sequences(lengths).packed, sequences(lengths).padded):
        batch = lay_out(torch.tensor(rows, dtype=torch.int64), CPU)
        numbers = torch.arange(1.0, len(batch.targets) + 1, dtype=torch.float64)
        expected, left = [], numbers.tolist()
        for row in rows:
            expected.append(sum(left[: lengths[row][1]]))
            left = left[lengths[row][1] :]
        sums = batch.sums_by_row(numbers)
        assert sums.tolist() == expected and sums.dtype == torch.float64 and left == []


def test_sums_by_row_hand_each_token_the_gradient_of_its_row():
    batch = sequences([(1, 2), (1, 0), (1, 3)]).packed(torch.tensor([2, 1, 0]), CPU)
    numbers = torch.zeros(5, requires_grad=True)
    (batch.sums_by_row(numbers) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert numbers.grad.tolist() == [1, 1, 1, 100, 100]


# Dealing rows out


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.integers(1, 5))
def test_the_plan_keeps_its_promises(lengths, budget, num_ranks):
    plan = plan_micro_batches(torch.tensor(lengths, dtype=torch.int64), token_budget=budget, num_ranks=num_ranks)
    assert len(plan) == num_ranks
    assert sorted(row for rank in plan for rows in rank for row in rows.tolist()) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    loads = [sum(lengths[row] for rows in rank for row in rows.tolist()) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    for rank in plan:
        sizes = [[lengths[row] for row in rows.tolist()] for rows in rank]
        assert all(len(micro) <= 1 or len(micro) * max(micro) <= budget for micro in sizes)
        full = [micro for micro in sizes if micro]
        assert sizes[: len(full)] == full
        assert all(min(here) >= max(following) for here, following in itertools.pairwise(full))
        assert all(rows.dtype == torch.int64 for rows in rank)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 120), st.booleans())
def test_no_other_cut_costs_less(lengths, budget, packed):
    """Of all ways to cut rows in this order. Whole numbers: eight times the tokens."""
    sizes = sorted(lengths, reverse=True)

    def cost(parts):
        tokens = [sum(part) if packed else len(part) * part[0] for part in parts]
        if any(own > budget and len(part) > 1 for own, part in zip(tokens, parts, strict=True)):
            return math.inf
        return 8 * sum(tokens) + budget * len(parts)

    def cuts(rows):
        yield [rows]
        for first in range(1, len(rows)):
            yield from ([rows[:first], *rest] for rest in cuts(rows[first:]))

    found = cut_by_length(range(len(sizes)), sizes, token_budget=budget, packed=packed)
    assert [row for part in found for row in part] == list(range(len(sizes)))
    assert cost([[sizes[row] for row in part] for part in found]) == min(map(cost, cuts(sizes)))


def test_the_plan_by_hand():
    lengths = torch.tensor([3, 9, 4, 8, 2])  # longest first: 9 -> rank 0, 8 -> 1, 4 -> 1, 3 -> 0, 2 -> 0 or 1 (12 = 12)
    first, second = plan_micro_batches(lengths, token_budget=9, num_ranks=2)
    assert [rows.tolist() for rows in first] == [[1], [0, 4]]
    assert [rows.tolist() for rows in second] == [[3], [2]]


def test_the_plan_is_the_same_whoever_makes_it():
    lengths = torch.tensor([5, 5, 5, 1, 9, 9, 3])
    one, other = (plan_micro_batches(lengths.clone(), token_budget=12, num_ranks=3) for _ in range(2))
    assert [[rows.tolist() for rows in rank] for rank in one] == [[rows.tolist() for rows in rank] for rank in other]


def test_no_rows_make_no_passes_on_any_rank():
    assert plan_micro_batches(torch.empty(0, dtype=torch.int64), token_budget=4, num_ranks=3) == [[], [], []]


def test_fewer_rows_than_ranks_give_the_others_empty_passes():
    plan = plan_micro_batches(torch.tensor([4]), token_budget=8, num_ranks=3)
    assert sorted(len(rows) for rank in plan for rows in rank) == [0, 0, 1]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.integers(1, 5))
def test_the_plan_of_packed_rows_counts_their_tokens_alone(lengths, budget, num_ranks):
    plan = plan_micro_batches(
        torch.tensor(lengths, dtype=torch.int64), token_budget=budget, num_ranks=num_ranks, packed=True
    )
    assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1
    assert sorted(row for rank in plan for rows in rank for row in rows.tolist()) == list(range(len(lengths)))
    for rank in plan:
        sizes = [[lengths[row] for row in rows.tolist()] for rows in rank if len(rows)]
        assert all(len(micro) == 1 or sum(micro) <= budget for micro in sizes)
        for here, following in itertools.pairwise(sizes):  # the next row never fitted
            assert sum(here) + following[0] > budget


def test_the_plan_of_packed_rows_by_hand():
    lengths = torch.tensor([5, 2, 1, 1, 1])
    ((*padded,),) = plan_micro_batches(lengths, token_budget=10, num_ranks=1)
    ((*packed,),) = plan_micro_batches(lengths, token_budget=10, num_ranks=1, packed=True)
    assert [rows.tolist() for rows in padded] == [[0], [1], [2, 3, 4]]
    assert [rows.tolist() for rows in packed] == [[0, 1, 2, 3, 4]]
