"""What a run's numbers say about its health: sentences, for whom it concerns to print."""

from collections.abc import Sequence
from typing import Any

import torch

# How far apart two computations of a log-probability may be, in nats, when micro-batches are cut in another way.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def of_another_policy(steps: Sequence[dict[str, Any]], dtype: torch.dtype) -> str | None:
    """Before an iteration's first step actor and rollout are the same policy: log-ratios are 0 but for rounding.

    Args:
        steps: the iteration's metrics, one entry a step.
        dtype: the actor's.
    """
    largest = steps[0]["policy/log_ratio_max"] if steps else 0.0
    if largest <= ROUNDING[dtype]:
        return None
    return (
        f"before the first step the actor's log-probabilities are up to {largest:.2g} nats from those of the rollout, "
        f"where rounding explains {ROUNDING[dtype]}: the update is not on-policy. Does the model compute something "
        f"else in training mode?"
    )
