"""What a run is stopped for, and what is kept of it for the user to look at."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.config import KLGuardConfig
from engine.rollout.experience import Experience


def ran_away(experience: Experience, guard: KLGuardConfig) -> bool:
    """Whether the actor is further from the ref than the guard allows."""
    kl = experience.kl.sum().item() / max(experience.num_scored, 1)
    return guard.max_kl is not None and kl > guard.max_kl


def quarantine_rows(
    experience: Experience, rows: dict[int, list[str]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Responses with which a step could not be taken, as lines of `quarantine.jsonl`.

    Args:
        rows: of the experience -> what of them is not finite.
    """
    sequences, kept = experience.sequences, []
    tokens = sequences.tokens.split(sequences.lengths.tolist())
    for row, broken in rows.items():
        length = int(sequences.prompt_lengths[row])
        prompt, response = tokens[row][:length].tolist(), tokens[row][length:].tolist()
        kept.append(
            {
                "not_finite": broken,
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(response),
                "score": experience.scores[row].item(),
                "prompt_tokens": prompt,
                "response_tokens": response,
            }
        )
    return kept
