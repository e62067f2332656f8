"""group_advantages.py: by hand, and against each other."""

import pytest
import torch

from engine.algorithms.group_advantages import (
    critic_free_advantages,
    group_centred,
    group_normalised,
    leave_one_out,
)
from engine.algorithms.masking import response_mask

SCORES = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
LENGTHS = torch.tensor([2, 0, 1, 3, 1, 1, 2, 2])
MASK = response_mask(LENGTHS, 3)
KL = torch.arange(24.0).view(8, 3).masked_fill(~MASK, float("nan"))


def advantages(estimator, *, kl_coef=0.0, gamma=1.0, group_size=4):
    given = dict(estimator=estimator, kl_coef=kl_coef, gamma=gamma, group_size=group_size)
    return critic_free_advantages(SCORES, KL, MASK, **given)


def test_grpo_by_hand():
    """Mean 3; deviations -2, -1, 0, 3; sample variance (4 + 1 + 0 + 9) / 3."""
    std = (14 / 3) ** 0.5
    wanted = torch.tensor([-2 / std, -1 / std, 0.0, 3 / std, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_normalised(SCORES, group_size=4), wanted, atol=1e-5, rtol=0)


def test_dr_grpo_and_rloo_by_hand():
    assert group_centred(SCORES, group_size=4).tolist() == [-2, -1, 0, 3, 0, 0, 0, 0]
    others = [(2 + 3 + 6) / 3, (1 + 3 + 6) / 3, (1 + 2 + 6) / 3, (1 + 2 + 3) / 3]
    wanted = [score - mean for score, mean in zip(SCORES[:4].tolist(), others, strict=True)]
    assert leave_one_out(SCORES, group_size=4).tolist() == pytest.approx([*wanted, 0, 0, 0, 0])


@pytest.mark.parametrize("function", [group_normalised, group_centred, leave_one_out])
def test_what_nobody_scored_is_no_part_of_its_group(function):
    scores, left_out = torch.tensor([1.0, 99.0, 2.0, 6.0, 5.0, 7.0, 7.0, 7.0]), torch.zeros(8, dtype=torch.bool)
    left_out[[1, 5, 6, 7]] = True
    found = function(scores, group_size=4, left_out=left_out)
    torch.testing.assert_close(found[[0, 2, 3]], function(torch.tensor([1.0, 2.0, 6.0]), group_size=3))
    assert found[[1, 4, 5, 6, 7]].tolist() == [0.0] * 5, "and who is alone is compared with nobody"


@pytest.mark.parametrize("score", [1000.1, 0.1, -77.7])
def test_equal_scores_have_no_advantage_whatever_their_size(score):
    for size in range(2, 17):
        assert group_normalised(torch.full((size,), score), group_size=size).abs().max() < 1e-5


@pytest.mark.parametrize("function", [group_normalised, group_centred, leave_one_out])
def test_a_constant_more_for_a_whole_group_changes_nothing(function):
    shifted = SCORES + torch.tensor([10.0] * 4 + [-3.0] * 4)
    torch.testing.assert_close(function(shifted, group_size=4), function(SCORES, group_size=4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("function", [group_normalised, group_centred, leave_one_out])
@pytest.mark.parametrize(("scores", "group_size"), [(SCORES, 3), (SCORES, 1), (SCORES.view(2, 4), 4)])
def test_what_cannot_be_grouped_is_refused(function, scores, group_size):
    with pytest.raises(ValueError, match=r"group_size=1 must be at least 2|must be \(B,\) with B a multiple"):
        function(scores, group_size=group_size)


@pytest.mark.parametrize(
    ("estimator", "function"), [("grpo", group_normalised), ("dr_grpo", group_centred), ("rloo", leave_one_out)]
)
def test_every_token_has_its_responses_advantage_kl_taken_off(estimator, function):
    kl = [[0.0, 1.0], [], [6.0], [9.0, 10.0, 11.0], [12.0], [15.0], [18.0, 19.0], [21.0, 22.0]]
    totals = SCORES - 0.1 * torch.tensor([sum(row) for row in kl])
    of_response = function(totals, group_size=4)
    found = advantages(estimator, kl_coef=0.1)
    assert found[~MASK].tolist() == [0.0] * int((~MASK).sum())
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[row, :length], of_response[row].expand(length), atol=1e-5, rtol=0)


def test_reinforce_plus_plus_is_the_rewards_still_to_come():
    """Row 3: KL 9, 10, 11 at coefficient 0.1 and gamma 0.5, score 6 at the end."""
    last = 6 - 1.1
    wanted = [-0.9 + 0.5 * (-1.0 + 0.5 * last), -1.0 + 0.5 * last, last]
    assert advantages("reinforce_plus_plus", kl_coef=0.1, gamma=0.5)[3].tolist() == pytest.approx(wanted)


def test_its_baseline_form_takes_the_groups_mean_score_off():
    plain, baseline = (
        advantages(name, kl_coef=0.1) for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
    )
    means = torch.tensor([3.0] * 4 + [5.0] * 4)
    torch.testing.assert_close((plain - baseline)[MASK], means[:, None].expand(8, 3)[MASK], atol=1e-5, rtol=0)
    assert advantages("reinforce_plus_plus", group_size=1).shape == (8, 3), "it asks for no group"


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="'gae' is not one of the critic-free ones"):
        advantages("gae")
