"""Where the score of a response comes from: a Python function of the user's, or a reward model that reads text."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.data.formatting import Prompt, encode_exchange, render, render_response
from engine.data.sequences import Sequences

ScoreFunction = Callable[..., list[float]]


def load_score_function(spec: str) -> ScoreFunction:
    """The function that `module:function` names; the folder that the run was started in is searched last.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, function_name = spec.split(":")
    if os.getcwd() not in sys.path:  # launchers put the script's folder there, not the one a user stands in
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward.function={spec}: importing {module_name} failed ({error}). It is looked for in {os.getcwd()}, on "
            f"PYTHONPATH and among the installed packages."
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
        inspect.signature(function).bind(prompts=prompts, responses=responses, **given)
    except TypeError as error:
        raise ValueError(
            f"the score function {name} is called with prompts, responses and the dataset's columns "
            f"({', '.join(given) or 'none'}), which do not fit its arguments: {error}. Columns it has no use for go "
            f"into **columns."
        ) from error
    try:
        scores = function(prompts=prompts, responses=responses, **given)
    except Exception as error:  # the user's code: whatever it raises is shown with the function's name
        where = traceback.extract_tb(error.__traceback__)[1:2]  # the line in the user's function itself
        place = "".join(f" ({frame.filename}, line {frame.lineno})" for frame in where)
        raise ValueError(f"the score function {name} raised {type(error).__name__}: {error}{place}") from error
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the score function {name} returned something that is not a list of numbers: {error}"
        ) from error
    if len(numbers) != len(responses):
        raise ValueError(f"the score function {name} returned {len(numbers)} scores for {len(responses)} responses.")
    return torch.tensor(numbers, dtype=torch.float32)


def sequences_for_another_tokenizer(
    exchanges: Iterable[tuple[Prompt, str, str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Sequences:
    """Responses as a reward model reads them that does not share the actor's tokens or template.

    Args:
        exchanges: for each response the prompt as the dataset has it, the prompt's text as the actor saw it, the
            response's text, and whether it ended by itself. A prompt that is text is taken as the actor saw it.
        tokenizer: the reward model's. One of a response that ended is ended by its own end-of-sequence token.
    """
    prompts, responses = [], []
    for prompt, text, response, ended in exchanges:
        asked = text if isinstance(prompt, str) else prompt
        answer = render_response(asked, response, tokenizer)
        if not ended:  # nor does it end its turn
            answer = answer.removesuffix(_end_of_turn(asked, tokenizer))
        ids = encode_exchange(render(asked, tokenizer), answer, tokenizer)
        prompts.append(ids[0])
        responses.append(ids[1] if ended else ids[1][:-1])
    return Sequences.of(prompts, responses)


def _end_of_turn(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after a response, whatever the response; nothing after text."""
    mark = "\ue000response\ue001"  # of private use: no template writes it
    return render_response(prompt, mark, tokenizer).partition(mark)[2]
