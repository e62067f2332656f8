"""Which columns of a source hold prompts and responses: demonstrations (one response) and preferences (two)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.data.formatting import ASSISTANT_TURN, Prompt, as_prompt, exchange, is_answered
from engine.data.sources import PROMPT_COLUMNS, RESPONSE_COLUMNS, Source, at


@dataclass(frozen=True, kw_only=True)
class Found:
    """E examples as a source has them, not yet token ids."""

    name: str  # of the source
    places: list[str]
    exchanges: list[list[tuple[Prompt, str]]]  # of each example the one, or chosen and rejected
    margins: list[float]

    def __getitem__(self, picked: list[int]) -> "Found":
        lists = (self.places, self.exchanges, self.margins)
        places, exchanges, margins = ([values[number] for number in picked] for values in lists)
        return Found(name=self.name, places=places, exchanges=exchanges, margins=margins)


Reader = Callable[[Source, Any], Found]


def demonstrations(source: Source, data) -> Found:
    """What SFT learns from. A column that is prompt and response at once holds whole conversations.

    Args:
        data: `prompt_column`, `response_column`, `prompt_format`; see `engine.config.data`.

    Raises:
        ValueError: names file and line of a row that is not a demonstration.
    """
    prompt = source.column(data.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
    response = source.column_if_any(data.response_column, RESPONSE_COLUMNS, "--data.response_column")
    cells = source.prompts(prompt, data.prompt_column)
    if response is None and isinstance(cells[0], str) and ASSISTANT_TURN not in cells[0]:  # nothing to be split
        response = source.column(None, RESPONSE_COLUMNS, "--data.response_column")
    exchanges = []
    for row, cell, place in zip(source.rows, cells, source.places, strict=True):
        if response in (None, prompt):
            exchanges.append([at(f"{place}, column {prompt!r}", exchange, None, cell)])
            continue
        if is_answered(cell):
            raise ValueError(
                f"{place}: column {prompt!r} ends with the assistant's turn, and column {response!r} holds a response "
                f"too. To learn the conversation's own, set --data.response_column {prompt}."
            )
        asked = at(f"{place}, column {prompt!r}", as_prompt, cell, data.prompt_format)
        exchanges.append([at(f"{place}, column {response!r}", exchange, asked, row.get(response))])
    return Found(name=source.name, places=source.places, exchanges=exchanges, margins=[0.0] * len(exchanges))


def preferences(source: Source, data) -> Found:
    """What a reward model and DPO learn from; as `demonstrations`.

    Args:
        data: `prompt_column`, `chosen_column`, `rejected_column`, `margin_column`, `prompt_format`.
    """
    prompt = source.column_if_any(data.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
    answers = (
        source.column(data.chosen_column, ("chosen",), "--data.chosen_column"),
        source.column(data.rejected_column, ("rejected",), "--data.rejected_column"),
    )
    margin = source.column_if_any(data.margin_column, (), "--data.margin_column")
    whole = prompt is None or prompt in answers
    cells = [None] * len(source.rows) if whole else source.prompts(prompt, data.prompt_column)
    pairs, margins = [], []
    for row, cell, place in zip(source.rows, cells, source.places, strict=True):
        asked = None if whole else at(f"{place}, column {prompt!r}", as_prompt, cell, data.prompt_format)
        pairs.append([at(f"{place}, column {column!r}", exchange, asked, row.get(column)) for column in answers])
        margins.append(0.0 if margin is None else at(f"{place}, column {margin!r}", _number, row.get(margin)))
    return Found(name=source.name, places=source.places, exchanges=pairs, margins=margins)


def _number(cell) -> float:
    """A number, or text that is one: a CSV file holds nothing but text."""
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not torch.tensor(number, dtype=torch.float32).isfinite():
        raise ValueError(f"a margin is a number, this is {str(cell)[:80]!r}.")
    return number
