"""Where a PPO run stands: all that changes from iteration to iteration besides the models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.algorithms.kl import schulman_kl_coef, ziegler_kl_coef
from engine.algorithms.rewards import Moments
from engine.config import PPOConfig
from engine.rollout.experience import Experience


@dataclass
class Progress:
    """
    Attributes:
        iteration: the one under way, or the last; from 1.
        minibatches: of this iteration, that have had their step or were skipped.
        kl_coef: for the next experience.
        penalty_coef: for the next experience's steps.
        scores: of all scores so far, where they are normalised.
        roll_backs: how often the KL guard has sent the run back.
    """

    iteration: int = 0
    minibatches: int = 0
    kl_coef: float = 0.0
    penalty_coef: float = 0.0
    scores: Moments = field(default_factory=Moments)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    roll_backs: int = 0

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Progress":
        """What `dataclasses.asdict` made of one."""
        return cls(**kept | {"scores": Moments(*kept["scores"])})


def next_kl_coef(config: PPOConfig, experience: Experience) -> float:
    """The KL coefficient after an iteration with this KL per response."""
    coef, kl = experience.kl_coef, experience.kl.sum().item() / experience.num_scored
    if config.kl_controller == "fixed" or not experience.is_finite:
        return coef
    if config.kl_controller == "schulman":
        return schulman_kl_coef(coef, kl, target=config.kl_target)
    return ziegler_kl_coef(
        coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_responses=experience.num_scored
    )


def next_penalty_coef(config: PPOConfig, coef: float, steps: Sequence[dict[str, Any]]) -> float:
    """The coefficient of `policy_loss: penalty` after an iteration with these steps."""
    tokens = sum(step["tokens"] for step in steps)
    kl = sum(step["policy/approx_kl"] * step["tokens"] for step in steps) / tokens if steps else math.nan
    if config.policy_loss == "clip" or not math.isfinite(kl):
        return coef
    return schulman_kl_coef(coef, kl, target=config.penalty_target)
