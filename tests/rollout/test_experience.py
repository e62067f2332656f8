"""experience.py: flat tensors say the same as padded ones, whatever the order of the rows."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import gae, monte_carlo, temporal_difference
from engine.algorithms.masking import whiten
from engine.algorithms.rewards import kl_shaped_rewards
from engine.data.sequences import Sequences
from engine.rollout.experience import PER_TOKEN, Experience, padded, shaped_experience
from engine.rollout.measuring import Measurements

GIVEN = dict(
    kl_coef=0.3,
    kl_placement="reward",
    advantage_estimator="gae",
    whitened=True,
    group_size=1,
    gamma=0.9,
    lam=0.8,
    value_label="gae",
)
MEASURED = [f.name for f in fields(Measurements)]
RESPONSES = [3, 0, 1, 5, 2]


def rolled_out(lengths=RESPONSES, seed=0):
    """(sequences, scores, measurements) with prompts of 1, 2, 3, 1, ... tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [[7] * (1 + row % 3) for row in range(len(lengths))]
    responses = [[10 + row] * length for row, length in enumerate(lengths)]
    scores = torch.randn(len(lengths), generator=generator)
    measured = {name: torch.randn(sum(lengths), generator=generator) for name in MEASURED}
    return Sequences.of(prompts, responses), scores, Measurements(**measured)


def experience(lengths=RESPONSES, seed=0, **given) -> Experience:
    return shaped_experience(*rolled_out(lengths, seed), **GIVEN | given)


def as_rows(flat, lengths=RESPONSES) -> list[list[float]]:
    return [part.tolist() for part in flat.split(list(lengths))]


def to_padded(flat, lengths, fill=float("nan")):
    rows = torch.full((len(lengths), max(lengths)), fill)
    for row, part in enumerate(flat.split(list(lengths))):
        rows[row, : len(part)] = part
    return rows


# Shaping


@pytest.mark.parametrize("value_label", ["gae", "monte_carlo", "temporal_difference"])
def test_shaping_is_the_algorithms_on_padded_tensors(value_label):
    sequences, scores, measured = rolled_out()
    shaped = shaped_experience(sequences, scores, measured, **GIVEN | dict(value_label=value_label))
    mask = torch.tensor([[column < length for column in range(5)] for length in RESPONSES])
    kl, values = to_padded(measured.kl, RESPONSES), to_padded(measured.values, RESPONSES)
    rewards = kl_shaped_rewards(scores, kl, mask, kl_coef=0.3)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    targets = {
        "gae": returns,
        "monte_carlo": monte_carlo(rewards, mask, gamma=0.9),
        "temporal_difference": temporal_difference(rewards, values, mask, gamma=0.9),
    }
    assert torch.equal(shaped.rewards, rewards[mask])
    assert torch.equal(shaped.advantages, whiten(advantages, mask)[mask])
    assert torch.equal(shaped.returns, targets[value_label][mask])
    assert shaped.scores is scores
    assert all(torch.equal(getattr(shaped, name), getattr(measured, name)) for name in MEASURED)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_responses_have_no_advantage_beside_one_that_nobody_scored(estimator):
    """Its KL went with its response, so that filling its score in would set it apart."""
    sequences = Sequences.of([[5]] * 4, [[6, 7], [], [6, 7], [6, 7]])
    measured = Measurements(**{name: torch.full((6,), 0.5) for name in MEASURED})
    scores, left_out = torch.tensor([2.0, 0.0, 2.0, 2.0]), torch.tensor([False, True, False, False])
    given = GIVEN | dict(advantage_estimator=estimator, whitened=False, group_size=4, left_out=left_out)
    assert shaped_experience(sequences, scores, measured, **given).advantages.abs().max() < 1e-6


def test_shaping_by_hand():
    """One response of two tokens and one of one: r = -0.5 kl (+ score at the end), gamma 1, lambda 1."""
    sequences = Sequences.of([[1], [1]], [[2, 3], [4]])
    flat = dict.fromkeys(MEASURED, torch.zeros(3)) | dict(
        kl=torch.tensor([1.0, 2.0, 4.0]), values=torch.tensor([0.5, 1.0, 2.0])
    )
    given = GIVEN | dict(kl_coef=0.5, gamma=1.0, lam=1.0)
    shaped = shaped_experience(sequences, torch.tensor([3.0, 1.0]), Measurements(**flat), **given)
    torch.testing.assert_close(shaped.rewards, torch.tensor([-0.5, 2.0, -1.0]))
    torch.testing.assert_close(shaped.returns, torch.tensor([1.5, 2.0, -1.0]))
    # advantages 1, 1, -3: mean -1/3, population variance (16/9 + 16/9 + 64/9) / 3 = 32/9
    raw = torch.tensor([1.0, 1.0, -3.0])
    torch.testing.assert_close(shaped.advantages, (raw + 1 / 3) / (32 / 9) ** 0.5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any), st.randoms(use_true_random=False))
def test_shaping_does_not_depend_on_the_order_of_rows(lengths, random):
    sequences, scores, measured = rolled_out(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = torch.tensor(order)
    shuffled = Measurements(
        **{name: torch.cat([getattr(measured, name).split(lengths)[row] for row in order]) for name in MEASURED}
    )
    given_ = GIVEN | dict(value_label="monte_carlo")
    one = shaped_experience(sequences, scores, measured, **given_)
    other = shaped_experience(sequences[rows], scores[rows], shuffled, **given_)
    for name in PER_TOKEN:
        wanted = torch.cat([getattr(one, name).split(lengths)[row] for row in order])
        torch.testing.assert_close(getattr(other, name), wanted, atol=1e-5, rtol=1e-5)


def test_whitening_is_over_tokens_of_all_rows_together():
    advantages = experience(lengths=[30, 1, 9]).advantages
    assert advantages.mean().abs() < 1e-5
    torch.testing.assert_close(advantages.square().mean(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_all_responses_empty():
    nothing = experience(lengths=[0, 0])
    assert len(nothing) == 2 and nothing.advantages.shape == (0,) and nothing.is_finite
    assert nothing.padded("kl").shape == (2, 0)


# Rows


def test_padded_is_zero_where_there_is_no_token():
    flat = torch.arange(1.0, 12.0)
    wanted = [[1, 2, 3, 0, 0], [0, 0, 0, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]
    assert padded(flat, torch.tensor(RESPONSES)).tolist() == wanted
    assert replace(experience(), kl=flat).padded("kl").tolist() == wanted


def test_picking_rows_takes_every_field_along():
    whole = experience()
    picked = whole[torch.tensor([3, 1, 0])]
    assert picked.scores.tolist() == whole.scores[[3, 1, 0]].tolist()
    assert picked.sequences.response_lengths.tolist() == [5, 0, 3]
    for name in PER_TOKEN:
        rows = as_rows(getattr(whole, name))
        assert as_rows(getattr(picked, name), [5, 0, 3]) == [rows[3], rows[1], rows[0]]


def test_a_micro_batch_finds_its_own_tokens():
    whole = experience()
    batch = whole.sequences.padded(torch.tensor([4, 0]), torch.device("cpu"))
    rows = as_rows(whole.advantages)
    assert whole.of(batch, "advantages").tolist() == rows[4] + rows[0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 6))
def test_minibatches_hold_every_row_once(lengths, size):
    whole = replace(experience(lengths), scores=torch.arange(float(len(lengths))))
    batches = list(whole.minibatches(size, torch.Generator().manual_seed(0)))
    assert sorted(score for batch in batches for score in batch.scores.tolist()) == list(range(len(lengths)))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    rows = as_rows(whole.returns, lengths)
    for batch in batches:
        assert as_rows(batch.returns, [lengths[int(row)] for row in batch.scores]) == [
            rows[int(row)] for row in batch.scores
        ]


def test_minibatches_come_in_a_fresh_order_drawn_from_the_generator_alone():
    whole = experience(lengths=[1] * 16)
    rng = torch.Generator().manual_seed(3)

    def order(rng):
        return [batch.scores.tolist() for batch in whole.minibatches(4, rng)]

    torch.manual_seed(0)
    first, second = order(rng), order(rng)
    torch.manual_seed(99)
    assert first != second
    assert order(torch.Generator().manual_seed(3)) == first


# What is not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*PER_TOKEN, "scores"])
def test_what_is_not_finite_is_named(name, bad):
    whole = experience()
    assert whole.is_finite and whole.not_finite == ""
    tensor = getattr(whole, name).clone()
    tensor[[0, 2]] = bad
    broken = replace(whole, **{name: tensor})
    assert not broken.is_finite
    assert broken.not_finite == f"not finite: 2 of {name}"


def test_a_broken_score_spoils_the_whole_iteration():
    """Advantages are whitened together, so that one NaN reaches every row: no minibatch may be trained on."""
    sequences, scores, measured = rolled_out()
    scores[0] = float("nan")
    shaped = shaped_experience(sequences, scores, measured, **GIVEN)
    assert all(
        not minibatch.is_finite
        for minibatch in shaped.minibatches(2, torch.Generator())
        if minibatch.sequences.num_response_tokens
    )


# Shapes


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_per_token_tensor_of_another_shape_is_refused_by_name(name):
    whole = experience()
    for wrong in (torch.zeros(10), torch.zeros(11, 1), torch.zeros(5, 5), torch.zeros(whole.sequences.lengths.sum())):
        with pytest.raises(ValueError, match=rf"Experience\.{name} has shape .*11 tokens"):
            replace(whole, **{name: wrong})


def test_scores_of_another_shape_are_refused_by_name():
    for wrong in (torch.zeros(4), torch.zeros(11), torch.zeros(5, 1)):
        with pytest.raises(ValueError, match=r"Experience\.scores has shape .*5 responses"):
            replace(experience(), scores=wrong)


def test_nothing_is_edited_in_place():
    with pytest.raises(AttributeError, match="cannot assign"):
        experience().scores = torch.zeros(5)
