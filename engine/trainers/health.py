"""What a run's numbers say about its health: a sentence for each sign of trouble, once in a run."""

from collections.abc import Sequence
from typing import Any

import torch

# How far apart two computations of a log-probability may be, in nats, when micro-batches are cut in another way.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
LOWEST_KL = -0.1  # nats per response; an estimate of something that is never negative
FEW_EOS = 0.02  # of the responses
PINNED = 0.98  # of max_response_tokens, on average
SAME_SCORES = 1e-4  # standard deviation over the size of the mean, or over 1


def signs_of_trouble(
    metrics: dict[str, float], steps: Sequence[dict[str, Any]], *, dtype: torch.dtype, max_response_tokens: int
) -> dict[str, str]:
    """Name -> sentence.

    Args:
        metrics: an iteration's, by the names of `engine.tracking`.
        steps: the metrics of its optimizer steps.
        dtype: the actor's.
    """
    signs = {}
    if (kl := metrics["kl/ref_mean"]) < LOWEST_KL:
        signs["kl below zero"] = (
            f"the KL to the ref is {kl:.2f} nats per response, which no KL is: do actor and ref read the same tokens "
            f"in the same way?"
        )
    if (ended := metrics["response/eos_fraction"]) < FEW_EOS:
        signs["no end"] = (
            f"{ended:.0%} of the responses end by themselves: the actor does not know its end-of-sequence token, "
            f"longer responses are rewarded, or rollout.max_response_tokens={max_response_tokens} cuts them all off."
        )
    elif (length := metrics["response/length_mean"]) > PINNED * max_response_tokens:
        signs["length pinned"] = (
            f"responses have {length:.0f} tokens on average, of {max_response_tokens} at most: longer ones are "
            f"rewarded, or ends are not."
        )
    if metrics["score/std"] < SAME_SCORES * max(1.0, abs(metrics["score/mean"])):
        signs["equal scores"] = f"all responses have the score {metrics['score/mean']:.4g}: nothing tells them apart."
    if (apart := another_policy(steps, dtype)) is not None:
        signs["another policy"] = apart
    return signs


def another_policy(steps: Sequence[dict[str, Any]], dtype: torch.dtype) -> str | None:
    """Before an iteration's first step actor and rollout are the same policy: log-ratios are 0 but for rounding."""
    largest = steps[0]["policy/log_ratio_max"] if steps else 0.0
    if largest <= ROUNDING[dtype]:
        return None
    return (
        f"before the first step the actor's log-probabilities are up to {largest:.2g} nats from those of the rollout, "
        f"where rounding explains {ROUNDING[dtype]}: the update is not on-policy. Does the model compute something "
        f"else in training mode?"
    )


def planned_and_measured(metrics: dict[str, float], *, on_gpu: bool) -> str:
    """A sentence on the memory of one rank."""
    planned, measured = metrics["memory/planned_gib"], metrics["memory/peak_gib"]
    said = f"Memory at the peak: {planned:.3f} GiB planned, {measured:.3f} GiB measured"
    if on_gpu:
        return f"{said} ({measured / planned - 1:+.0%})."
    return f"{said}; on a CPU that is the whole process, with Python and its libraries, which are not in the plan."
