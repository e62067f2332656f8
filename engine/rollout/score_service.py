"""Scores from an HTTP service.

One POST per rank and iteration, JSON both ways:

    {"prompts": [...], "responses": [...], "columns": {"answer": [...]}}  ->  {"scores": [0.5, ...]}

What a column holds that JSON has no word for goes as text (dates), or as null (NaN, infinities).

In a run with an environment `columns` has whole dialogues too, `conversations`: a list of messages each.
"""

import math
import time
from typing import Any

import httpx
from torch import Tensor

from engine.config.secrets import with_environment, without_secrets
from engine.rollout.score_functions import checked_scores

MOST_SHOWN = 1000  # characters of an answer that is not the scores
FIRST_WAIT_S = 0.5  # before the second attempt; twice as long before each further one


def scores_of_service(
    url: str,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    timeout_s: float | None,
    retries: int,
) -> Tensor:
    """(rows,) fp32.

    A service that cannot be reached, takes too long, or answers 429 or 5xx is asked again.

    Args:
        url: `$NAME` and `${NAME}` in it are filled in from the environment; what looks like a secret is not shown.
        timeout_s: for one attempt.
        retries: attempts after the first.

    Raises:
        ValueError: names the service and what it did, when the last attempt failed, or when asking again would not
            help: another status, or an answer that is not the scores.
    """
    source, url = f"the score service {without_secrets(url)}", with_environment(url)
    body = _as_json({"prompts": prompts, "responses": responses, "columns": columns})
    for attempt in range(retries + 1):
        if attempt > 0:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            answer = httpx.post(url, json=body, timeout=timeout_s)
        except httpx.TimeoutException:
            trouble = f"took longer than reward.timeout_s={timeout_s}"
        except httpx.TransportError as error:
            trouble = f"could not be reached ({error})"
        else:
            if answer.status_code == 200:
                return checked_scores(_scores_in(answer, source), len(responses), source)
            trouble = f"answered {answer.status_code}: {answer.text[:MOST_SHOWN]}"
            if answer.status_code != 429 and answer.status_code < 500:
                break
    times = f" {attempt + 1} times" if attempt > 0 else ""
    raise ValueError(f"{source} {trouble}{',' + times if times else ''}.")


def _as_json(value: Any) -> Any:
    """The same in dictionaries, lists, texts, numbers, booleans and nulls."""
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _scores_in(answer: httpx.Response, source: str) -> Any:
    try:
        return answer.json()["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{source} did not answer {{"scores": [...]}} but {answer.text[:MOST_SHOWN]!r}') from error
