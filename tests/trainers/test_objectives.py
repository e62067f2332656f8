"""objectives.py by hand: what is reported of given numbers, and that the parts of a loss add up to what is reported."""

import math

import pytest
import torch

from engine.algorithms.preference_losses import bradley_terry_loss
from engine.data import Examples
from engine.data.sequences import Sequences
from engine.trainers.objectives import BradleyTerry, DirectPreference, NextToken, correlation, share_won


def examples(lengths: list[int], *, rows_per_example: int = 2, margins=None, ref=None) -> Examples:
    """With responses of these lengths."""
    count = len(lengths) // rows_per_example
    return Examples(
        sequences=Sequences.of([[5, 6]] * len(lengths), [[7] * length for length in lengths]),
        rows_per_example=rows_per_example,
        margins=torch.tensor(margins or [0.0] * count),
        ref_logprobs=None if ref is None else torch.tensor(ref),
    )


def direct_preference(ask=None, **changes) -> DirectPreference:
    return DirectPreference(
        ask, **dict(loss="dpo", beta=0.1, label_smoothing=0.0, sft_coef=0.0, chunk_tokens=8) | changes
    )


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# SFT


def test_every_token_weighs_the_same():
    """Log-probs -2 of one token and -3 of four: 5 / 5, not the mean 1.375 of the rows' means 2 and 0.75."""
    found = NextToken(chunk_tokens=8).metrics(torch.tensor([-2.0, -3.0]), examples([1, 4], rows_per_example=1))
    assert found == pytest.approx({"loss": 1.0, "perplexity": math.e})


@pytest.mark.parametrize(("number", "perplexity"), [(-1e6, math.exp(700.0)), (-math.inf, math.exp(700.0))])
def test_a_perplexity_beyond_floats_is_a_large_number(number, perplexity):
    found = NextToken(chunk_tokens=8).metrics(torch.tensor([number]), examples([1], rows_per_example=1))
    assert found["perplexity"] == pytest.approx(perplexity)


def test_the_metrics_of_what_is_not_finite_are_nan():
    found = NextToken(chunk_tokens=8).metrics(torch.tensor([math.nan]), examples([1], rows_per_example=1))
    assert math.isnan(found["loss"]) and math.isnan(found["perplexity"])


# Reward model

SCORES = [1.0, 0.5, 2.0, 2.0, -1.0, 3.0]  # won, tied, lost


def test_what_a_reward_model_reports_by_hand():
    found = BradleyTerry().metrics(torch.tensor(SCORES), examples([2, 4, 1, 1, 3, 7], margins=[0.0, 0.5, 1.0]))
    x, y = [score - 1.25 for score in SCORES], [length - 3.0 for length in (2, 4, 1, 1, 3, 7)]
    wanted = {
        "loss": (softplus(-0.5) + softplus(0.5) + softplus(5.0)) / 3,
        "accuracy": 0.5,  # 1 + 1/2 + 0 of 3
        "margin": (0.5 + 0.0 - 4.0) / 3,
        "score_mean": 7.5 / 6,
        "score_std": math.sqrt(sum(a * a for a in x) / 6),
        "length_correlation": sum(a * b for a, b in zip(x, y, strict=True))
        / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)),
    }
    assert found == pytest.approx(wanted, abs=1e-6)


def test_correlation_is_one_minus_one_or_nothing():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, 3 * x + 7) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
    assert correlation(x, torch.ones(3)) == correlation(torch.ones(3), x) == 0.0


def test_a_tie_is_half_a_win():
    won = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert share_won(won, torch.tensor([0.0, 0.0, 0.0, 1.0])) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert share_won(won, won) == 0.5


def test_a_score_that_is_not_finite_wins_nothing():
    nan = torch.tensor([math.nan])
    assert share_won(nan, torch.zeros(1)) == share_won(torch.zeros(1), nan) == share_won(nan, nan) == 0.0


# DPO

LOGPROBS, REF = [-8.0, -6.0, -3.0, -3.0], [-10.0, -5.0, -3.0, -3.0]  # differences +2, -1, 0, 0


def test_what_dpo_reports_by_hand():
    found = direct_preference().metrics(torch.tensor(LOGPROBS), examples([1, 2, 3, 4], ref=REF))
    wanted = {
        "loss": (0.554355 + math.log(2)) / 2,
        "accuracy": 0.75,  # a win and a tie
        "margin": 0.1 * 3 / 2,
        "reward_chosen": 0.1 * 2 / 2,
        "reward_rejected": 0.1 * -1 / 2,
        "logprobs_chosen": -5.5,
        "logprobs_rejected": -4.5,
    }
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (dict(label_smoothing=0.2), (0.8 * softplus(-0.3) + 0.2 * softplus(0.3) + math.log(2)) / 2),
        (dict(beta=0.5), (softplus(-1.5) + math.log(2)) / 2),
        (dict(loss="ipo"), ((3 - 5) ** 2 + (0 - 5) ** 2) / 2),
        (dict(sft_coef=0.3), (0.554355 + math.log(2)) / 2 + 0.3 * (8 / 1 + 3 / 3) / 2),  # chosen: of 1 and of 3 tokens
        (dict(loss="ipo", sft_coef=0.3), ((3 - 5) ** 2 + (0 - 5) ** 2) / 2 + 0.3 * (8 / 1 + 3 / 3) / 2),
    ],
)
def test_the_settings_reach_the_loss(changes, wanted):
    found = direct_preference(**changes).metrics(torch.tensor(LOGPROBS), examples([1, 2, 3, 4], ref=REF))
    assert found["loss"] == pytest.approx(wanted, abs=1e-6)


def test_the_ref_is_asked_once_and_only_where_its_answers_are_missing():
    asked = []

    def ask(given):
        asked.append(given)
        return torch.tensor(REF)

    objective, without = direct_preference(ask), examples([1, 2, 3, 4])
    prepared = objective.prepared(without)
    assert prepared.ref_logprobs.tolist() == REF and asked == [without]
    assert objective.prepared(prepared) is prepared and len(asked) == 1


# Parts of a minibatch


def split_losses(objective, numbers, given, rows_of_parts) -> float:
    """The parts' losses; the rows of a part in the order in which a plan might deal them."""
    return sum(objective.loss(numbers[rows], rows, given).item() for rows in map(torch.tensor, rows_of_parts))


def test_parts_of_demonstrations_add_up():
    numbers, given = torch.tensor([-2.0, -3.0, -7.0]), examples([1, 4, 2], rows_per_example=1)
    assert split_losses(NextToken(chunk_tokens=8), numbers, given, [[2, 0], [1]]) == pytest.approx(12 / 7)


@pytest.mark.parametrize("kind", ["reward", "dpo", "ipo", "dpo and sft"])
def test_parts_of_pairs_add_up_each_with_its_own_margin_and_ref(kind):
    """Pair 2 before pair 0: whoever takes the first margins for the part's own is found out."""
    numbers = torch.tensor([1.0, 0.5, 2.0, 2.0, -1.0, 3.0])
    given = examples([1, 2, 3, 4, 5, 6], margins=[0.0, 0.5, 1.0], ref=[0.0, 1.0, 2.0, -3.0, 4.0, 9.0])
    changes = dict(sft_coef=0.5) if kind == "dpo and sft" else dict(loss=kind)
    objective = BradleyTerry() if kind == "reward" else direct_preference(**changes)
    got = split_losses(objective, numbers, given, [[4, 5, 0, 1], [2, 3]])
    assert got == pytest.approx(objective.metrics(numbers, given)["loss"], rel=1e-6)
    if kind == "reward":
        chosen, rejected = numbers[::2], numbers[1::2]
        assert got == pytest.approx(bradley_terry_loss(chosen, rejected, given.margins, count=3).item(), rel=1e-6)
    if kind == "dpo":
        h = [0.1 * (1 - (0.5 - 1)), 0.1 * (0 - (2 + 3)) - 0.5, 0.1 * (-5 - (3 - 9)) - 1.0]
        assert got == pytest.approx(sum(softplus(-x) for x in h) / 3, rel=1e-6)


def test_a_part_without_rows_is_a_loss_of_zero_with_a_gradient():
    none = torch.empty(0, dtype=torch.int64)
    cases = [
        (NextToken(chunk_tokens=8), examples([1, 1], rows_per_example=1)),
        (BradleyTerry(), examples([1, 1])),
        (direct_preference(), examples([1, 1], ref=[0.0, 0.0])),
        (direct_preference(loss="ipo"), examples([1, 1], ref=[0.0, 0.0])),
        (direct_preference(sft_coef=1.0), examples([1, 1], ref=[0.0, 0.0])),
    ]
    for objective, given in cases:
        numbers = torch.empty(0, requires_grad=True)
        loss = objective.loss(numbers, none, given)
        loss.backward()
        assert loss.item() == 0.0 and numbers.grad is not None
