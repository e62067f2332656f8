"""What those who hold the loop themselves hand to `DeepSpeedPPOTrainer.step`, checked."""

from collections.abc import Sequence

from torch import Tensor

from engine.config import PPOConfig
from engine.data.sequences import Sequences
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.score_functions import checked_scores


def scored_sequences(
    rlhf_engine: DeepSpeedRLHFEngine,
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    scores: Sequence[float],
) -> tuple[Sequences, Tensor]:
    """This rank's, for `step`.

    Raises:
        ValueError: see `DeepSpeedRLHFEngine.given` and `checked_scores`; or the lists are not equally long.
    """
    if not len(queries) == len(responses) == len(scores):
        raise ValueError(
            f"step() was given {len(queries)} queries, {len(responses)} responses and {len(scores)} scores."
        )
    sequences = rlhf_engine.given(queries, responses, caller="step()")
    return sequences, checked_scores(scores, len(responses), "the caller of step()")


def check_groups(sequences: Sequences, config: PPOConfig) -> None:
    """
    Args:
        sequences: of all ranks.

    Raises:
        ValueError: responses that are compared with each other answer different queries.
    """
    size = config.rollout.samples_per_prompt
    if not config.compares_responses:
        return
    rows = zip(sequences.tokens.split(sequences.lengths.tolist()), sequences.prompt_lengths.tolist(), strict=True)
    queries = [row[:length].tolist() for row, length in rows]
    if len(queries) % size or any(queries[row] != queries[row - row % size] for row in range(len(queries))):
        raise ValueError(
            f"step(): advantage_estimator={config.advantage_estimator} compares "
            f"rollout.samples_per_prompt={size} responses to one query, which have to be neighbours."
        )
