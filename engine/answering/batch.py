"""A file of prompts -> a file of responses, one JSON object a line, in the prompts' order."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.answering.answerer import Answerer
from engine.answering.settings import AnsweringConfig, own_names
from engine.data.formatting import is_conversation, unanswered
from engine.data.prompts import PromptDataset
from engine.data.sources import PROMPT_COLUMNS, Row, Source, load_source

OWN_COLUMNS = ("prompt", "response", "finished", "tokens", "other_response", "other_finished", "other_tokens")


def write_responses(config: AnsweringConfig, answerers: list[Answerer]) -> None:
    """Answer all prompts, a batch at a time; a batch's lines are written whole when it is done.

    A line has the prompt as the file has it, `response`, `finished` (by an end-of-sequence token), `tokens`, the other
    model's three, and the row's other columns; one that has such a name already is called given_response, say.

    Raises:
        ValueError: names file and line of a row that is no prompt, or is too long; the output cannot be written.
    """
    with own_names():
        source = load_source(config.prompts)
        column = source.column(config.prompt_column, PROMPT_COLUMNS, "--prompt_column")
        cells = source.prompts(column, config.prompt_column)
        datasets = [_dataset(source, column, cells, answerer, config) for answerer in answerers]
    rows = sorted(set.intersection(*(set(dataset.kept) for dataset in datasets)))
    if not rows:
        raise ValueError(f"{config.prompts}: every prompt is too long for one of the models.")
    finished, path = 0, Path(config.output)
    _set_aside(path, config.prompts)
    try:
        file = open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - half a surrogate pair
    except OSError as error:
        raise ValueError(f"output={config.output} cannot be written to: {error}") from error
    with file, tqdm(total=len(rows), unit=" prompts", disable=None) as bar:
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            lines = [_kept(source.rows[row], column) | {"prompt": unanswered(cells[row])} for row in batch]
            for prefix, answerer, dataset in zip(("", "other_"), answerers, datasets, strict=False):
                keys = [(config.seed, row) for row in batch]
                answers = answerer.answers([dataset.tokens[row] for row in batch], keys)
                for line, answer in zip(lines, answers, strict=True):
                    line |= {f"{prefix}response": answer.text, f"{prefix}finished": answer.finished}
                    line[f"{prefix}tokens"] = answer.tokens
                finished += sum(answer.finished for answer in answers)
            file.write("".join(map(as_line, lines)))
            file.flush()
            bar.update(len(batch))
    limits = dict.fromkeys(str(answerer.sampling.max_response_tokens) for answerer in answerers)
    print(
        f"{path}: {len(rows)} prompts answered; {finished} of {len(rows) * len(answerers)} responses ended by "
        f"themselves, the others after {' or '.join(limits)} tokens (max_response_tokens).",
        file=sys.stderr,
    )


def as_line(row: Row) -> str:
    """A line of the output, own columns first. What JSON has no way to write becomes text, and NaN and inf null."""
    first = {name: row[name] for name in OWN_COLUMNS if name in row}
    return json.dumps(_plain(first | row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept(row: Row, prompt_column: str) -> Row:
    return {f"given_{name}" if name in OWN_COLUMNS else name: v for name, v in row.items() if name != prompt_column}


def _dataset(
    source: Source, column: str, cells: list[Any], answerer: Answerer, config: AnsweringConfig
) -> PromptDataset:
    """The prompts as training reads them, in this model's tokens; what it does to them is printed."""
    form = config.prompt_format or ("text" if config.system is None else "chat")
    if config.system is not None:
        cells = [opened_by(config.system, cell) for cell in cells]
    asked = replace(source, rows=[{column: cell} for cell in cells])
    dataset = PromptDataset([asked], answerer.tokenizer, prompt_column=column, prompt_format=form)
    longest = answerer.max_prompt_tokens or max(map(len, dataset.tokens))
    for said in (dataset.answers_cut(), dataset.limit_length(longest, config.over_length)):
        if said is not None:
            print(said if config.other is None else f"{answerer.label}: {said}", file=sys.stderr)
    return dataset


def opened_by(system: str, cell: Any) -> Any:
    """A conversation with a system message at its beginning, unless it has one; what is no prompt stays as it is."""
    turns = [{"role": "user", "content": cell}] if isinstance(cell, str) and cell else cell
    begins = is_conversation(turns) and turns[0]["role"] != "system"
    return [{"role": "system", "content": system}, *turns] if begins else turns


def _set_aside(path: Path, prompts: str) -> None:
    """Make room for the output, and keep an earlier one under another name."""
    if path.exists() and Path(prompts).exists() and path.samefile(prompts):
        raise ValueError(f"output={path} is the file of the prompts: name another one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size > 0:
            path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))
            print(f"{path} was there already: kept as {path.stem}.previous{path.suffix}.", file=sys.stderr)
    except OSError as error:
        raise ValueError(f"output={path} cannot be written to: {error}") from error
