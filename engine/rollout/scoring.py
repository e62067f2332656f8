"""Where the score of a whole response comes from, when it is not a reward model: a Python function of the user's."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

ScoreFunction = Callable[..., list[float]]


def load_score_function(spec: str) -> ScoreFunction:
    """The function that `module:function` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, function_name = spec.split(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward.function={spec}: importing {module_name} failed ({error}). "
            f"Is its folder on PYTHONPATH, or its package installed?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward.function={spec}: {module_name} has no function {function_name}.")
    return function


def scores_of_function(
    function: ScoreFunction, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]
) -> Tensor:
    """(rows,) fp32: `function(prompts=..., responses=..., **columns)`.

    Args:
        columns: the dataset's; one called `prompts` or `responses` gives way to the text the model saw.

    Raises:
        ValueError: the function raised, returned another number of scores, or something that is no number. NaN is
            let through: the step it belongs to is skipped on all ranks.
    """
    if not prompts:
        return torch.empty(0)
    given = {name: values for name, values in columns.items() if name not in ("prompts", "responses")}
    name = getattr(function, "__qualname__", type(function).__qualname__)  # a callable object has no name of its own
    try:
        scores = function(prompts=prompts, responses=responses, **given)
    except Exception as error:  # the user's code: whatever it raises is shown with the function's name
        raise ValueError(f"the score function {name} raised {type(error).__name__}: {error}") from error
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the score function {name} returned something that is not a list of numbers: {error}"
        ) from error
    if len(numbers) != len(responses):
        raise ValueError(f"the score function {name} returned {len(numbers)} scores for {len(responses)} responses.")
    return torch.tensor(numbers, dtype=torch.float32)
