"""progress.py: coefficients that follow the KL."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.trainers.progress import next_kl_coef, next_penalty_coef


def step(tokens, approx_kl):
    """What of an optimizer step's metrics is looked at."""
    return {"tokens": tokens, "policy/approx_kl": approx_kl}


@pytest.mark.parametrize(
    ("kls", "wanted"),
    [
        ([0.016], 2.0),  # more than 1.5 times the target of 0.01
        ([0.014], 1.0),
        ([0.007], 1.0),
        ([0.006], 0.5),  # less than the target / 1.5
        ([0.016, 0.0], 1.0),  # 3 tokens and 1: 0.012 on average
        ([math.nan], 1.0),
        ([], 1.0),  # every step was skipped
    ],
)
def test_the_penalty_is_doubled_or_halved_to_keep_the_kl_near_its_target(tmp_path, kls, wanted):
    steps = [step(tokens, kl) for tokens, kl in zip((3, 1), kls, strict=False)]
    for policy_loss, expected in (("penalty", wanted), ("clip", 1.0)):
        config = tiny.ppo_config(tmp_path, policy_loss=policy_loss, penalty_target=0.01)
        assert next_penalty_coef(config, 1.0, steps) == expected


class Rollout(SimpleNamespace):
    """What the KL controller looks at: four responses that were scored, and one that was not."""

    num_scored = 4

    def __len__(self):
        return 5


@pytest.mark.parametrize(
    ("controller", "kl_per_response", "wanted"),
    [
        ("fixed", 99.0, 0.5),
        ("schulman", 10.0, 1.0),  # more than 1.5 times the target of 6
        ("schulman", 8.0, 0.5),
        ("schulman", 3.0, 0.25),  # less than the target / 1.5
        ("ziegler", 12.0, 0.5 * (1 + 0.2 * 4 / 10)),  # 4 responses of a horizon of 10
        ("ziegler", 6.6, 0.5 * (1 + 0.1 * 4 / 10)),
        ("ziegler", 0.0, 0.5 * (1 - 0.2 * 4 / 10)),
    ],
)
def test_the_kl_coefficient_follows_the_kl_per_response(tmp_path, controller, kl_per_response, wanted):
    config = tiny.ppo_config(tmp_path, kl_controller=controller, kl_horizon=10.0)
    kl = torch.tensor([3.0, 1.0, 0.0]) * kl_per_response  # of three tokens of four responses
    rollout = Rollout(kl=kl, kl_coef=0.5, is_finite=True)
    assert next_kl_coef(config, rollout) == pytest.approx(wanted)
    rollout.is_finite = False
    assert next_kl_coef(config, rollout) == 0.5
