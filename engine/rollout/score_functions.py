"""Scores from a Python function of the user's: called with text and the dataset's columns, plain or async."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.rollout.users_code import named, place_of

ScoreFunction = Callable[..., Any]  # returns a list of numbers, or is async and does so in the end


def load_score_function(spec: str, *, setting: str = "reward.function") -> ScoreFunction:
    """The function that `module:function` or `file.py:function` names; see `named`.

    Args:
        setting: the one that holds `spec`, for the message.

    Raises:
        ValueError: there is no such module, file or function.
    """
    function = named(spec, setting=setting)
    if not callable(function):
        module_name, function_name = spec.split(":")
        raise ValueError(f"{setting}={spec}: {module_name} has no function {function_name}.")
    return function


def scores_of_function(
    function: ScoreFunction,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    timeout_s: float | None = None,
    kind: str = "score function",
) -> Tensor:
    """(rows,) fp32: `function(prompts=..., responses=..., **columns)`.

    Args:
        columns: the dataset's; one called `prompts` or `responses` gives way to the text the model saw.
        timeout_s: how long the call may take.
        kind: what the function is, for the message.

    Raises:
        ValueError: the function raised, took longer, returned another number of scores, or something that is no
            number. NaN is let through: the step it belongs to is skipped on all ranks.
    """
    if not prompts:
        return torch.empty(0)
    given = {name: values for name, values in columns.items() if name not in ("prompts", "responses")}
    # A callable object has no name of its own.
    said = f"the {kind} {getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        inspect.signature(function).bind(prompts=prompts, responses=responses, **given)
    except TypeError as error:
        raise ValueError(
            f"{said} is called with prompts, responses and the dataset's columns "
            f"({', '.join(given) or 'none'}), which do not fit its arguments: {error}. Columns it has no use for go "
            f"into **columns."
        ) from error
    try:
        scores = _within(timeout_s, lambda: _finished(function(prompts=prompts, responses=responses, **given)))
    except TimeoutError as error:
        raise ValueError(
            f"{said} took longer than reward.timeout_s={timeout_s} for {len(responses)} responses."
        ) from error
    except Exception as error:  # the user's code: whatever it raises is shown with the function's name
        place = place_of(error, caller=__file__)
        raise ValueError(f"{said} raised {type(error).__name__}: {error}{place}") from error
    return checked_scores(scores, len(responses), said)


def scores_one_by_one(
    function: ScoreFunction, prompts: list[str], responses: list[str], columns: dict[str, list[Any]], **given
) -> tuple[Tensor, list[str | None]]:
    """Scores of responses that the function can judge, NaN of the others, and what was wrong with those.

    Args:
        given: as for `scores_of_function`, whose arguments the others are too.
    """
    try:
        return scores_of_function(function, prompts, responses, columns, **given), [None] * len(prompts)
    except ValueError as error:
        if isinstance(error.__cause__, TimeoutError):  # row by row it would take longer still
            return torch.full((len(prompts),), torch.nan), [str(error)] * len(prompts)
    scores, errors = torch.full((len(prompts),), torch.nan), [None] * len(prompts)
    for row in range(len(prompts)):
        one = slice(row, row + 1)
        columns_of_one = {name: values[one] for name, values in columns.items()}
        try:
            scores[one] = scores_of_function(function, prompts[one], responses[one], columns_of_one, **given)
        except ValueError as error:
            errors[row] = str(error)
    return scores, errors


def checked_scores(scores: Sequence[Any], wanted: int, source: str) -> Tensor:
    """(wanted,) fp32.

    Raises:
        ValueError: names the source, when that is not what it returned.
    """
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} returned something that is not a list of numbers: {error}") from error
    if len(numbers) != wanted:
        raise ValueError(f"{source} returned {len(numbers)} scores for {wanted} responses.")
    return torch.tensor(numbers, dtype=torch.float32)


def _finished(result: Any) -> Any:
    """What an async function comes to in the end."""
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _within(timeout_s: float | None, call: Callable[[], Any]) -> Any:
    """`call()`, in a thread that is left to itself when it takes too long: Python has no way to end it.

    Raises:
        TimeoutError: it did; or whatever the call raises.
    """
    if timeout_s is None:
        return call()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # handed over to the thread that waits
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # a daemon does not keep the process from ending
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
