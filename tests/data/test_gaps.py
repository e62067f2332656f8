"""Sequences of episodes against slow Python: rows are lists of (token, is it the actor's own)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.sequences import Sequences

CPU = torch.device("cpu")
# Of each row the prompt's length and those of its parts: turn, reply, turn, ... Replies may be empty, turns may not.
PARTS = st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
    lambda turns: st.lists(st.integers(0, 3), min_size=len(turns) - 1, max_size=len(turns) - 1).map(
        lambda replies: [length for pair in zip(turns, [*replies, 0], strict=True) for length in pair][:-1]
    )
)
SHAPES = st.lists(st.tuples(st.integers(1, 4), PARTS), min_size=1, max_size=6)


def token_lists(shapes):
    """(prompts, parts), every token another number."""
    counter = iter(range(1, 10_000))

    def some(length):
        return [next(counter) for _ in range(length)]

    rows = [(some(prompt), [some(length) for length in parts]) for prompt, parts in shapes]
    return [prompt for prompt, _ in rows], [parts for _, parts in rows]


def marked(shapes) -> list[list[tuple[int, bool]]]:
    """Every row as (token, own), the prompt's not its own."""
    prompts, parts = token_lists(shapes)
    return [
        [(token, False) for token in prompt]
        + [(token, number % 2 == 0) for number, part in enumerate(row) for token in part]
        for prompt, row in zip(prompts, parts, strict=True)
    ]


def sequences(shapes) -> Sequences:
    return Sequences.of_turns(*token_lists(shapes))


def own(row) -> list[int]:
    return [token for token, is_own in row if is_own]


def check_against(rows, found: Sequences) -> None:
    """All that can be asked of sequences is what the marked rows say."""
    assert found.tokens.tolist() == [token for row in rows for token, _ in row]
    assert found.lengths.tolist() == [len(row) for row in rows]
    assert found.response_lengths.tolist() == [len(own(row)) for row in rows]
    assert found.num_response_tokens == sum(len(own(row)) for row in rows)
    everywhere = [token for row in rows for token in own(row)]
    for lay_out in (found.padded, found.packed):
        order = torch.arange(len(rows)).flip(0)
        batch = lay_out(order, CPU)
        flat = batch.input_ids.flatten()
        before = [row[at - 1][0] for row in rows[::-1] for at, (_, is_own) in enumerate(row) if is_own]
        assert flat[batch.positions].tolist() == before
        assert batch.targets.tolist() == [token for row in rows[::-1] for token in own(row)]
        assert batch.target_rows.tolist() == [line for line, row in enumerate(rows[::-1]) for _ in own(row)]
        assert flat[batch.last_positions].tolist() == [row[-1][0] for row in rows[::-1]]
        assert [everywhere[at] for at in batch.response_tokens.tolist()] == batch.targets.tolist()


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_the_actors_tokens_are_found_between_those_of_others(shapes):
    check_against(marked(shapes), sequences(shapes))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.data())
def test_picking_rows(shapes, data):
    picked = data.draw(st.lists(st.integers(0, len(shapes) - 1), min_size=1, max_size=6))
    rows = marked(shapes)
    check_against([rows[number] for number in picked], sequences(shapes)[torch.tensor(picked)])


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.data())
def test_rows_without_their_responses(shapes, data):
    gone = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    rows = [
        row[: shape[0]] if is_gone else row for row, shape, is_gone in zip(marked(shapes), shapes, gone, strict=True)
    ]
    check_against(rows, sequences(shapes).without_responses(torch.tensor(gone)))


@settings(deadline=None, max_examples=40)
@given(SHAPES)
def test_episodes_of_one_turn_are_plain_responses(shapes):
    prompts, parts = token_lists([(prompt, row[:1]) for prompt, row in shapes])
    episodes, plain = Sequences.of_turns(prompts, parts), Sequences.of(prompts, [row[0] for row in parts])
    assert plain.gaps is None and not episodes.gaps.any()
    rows = torch.arange(len(shapes))
    for lay_out in ("padded", "packed"):
        one, other = (vars(getattr(found, lay_out)(rows, CPU)) for found in (episodes, plain))
        for name, wanted in other.items():
            assert one[name] is wanted is None or torch.equal(one[name], wanted)


def test_by_hand():
    found = Sequences.of_turns([[1, 2], [3]], [[[10, 11], [20, 21, 22], [12]], [[13]]])
    assert found.gaps.tolist() == [0, 0, 3, 0]
    batch = found.padded(torch.tensor([0, 1]), CPU)
    assert batch.positions.tolist() == [1, 2, 6, 8] and batch.targets.tolist() == [10, 11, 12, 13]
    assert batch.last_positions.tolist() == [7, 9]


def test_what_cannot_be_a_row_is_refused():
    with pytest.raises(ValueError, match=r"Sequences\.tokens has 3 tokens"):  # ends with what others said
        Sequences.of_turns([[1]], [[[2], [3]]])
    whole = dict(tokens=[1, 2, 3], prompt_lengths=[1], response_lengths=[2], gaps=[0])
    with pytest.raises(ValueError, match=r"Sequences\.gaps has shape \(1,\); there are 2 response tokens"):
        Sequences(**{name: torch.tensor(values) for name, values in whole.items()})


def test_no_rows_at_all():
    nothing = Sequences.of_turns([], [])
    assert len(nothing) == 0 and nothing.gaps.shape == (0,) and nothing.gaps.dtype == torch.int64
