"""Files, folders and hub names -> rows that know where they came from: a bad one is an error with file and line.

source = load_source("train.jsonl")          # also .json, .csv, .parquet, a folder of these, or a hub name

Cells are what the file says: those of a CSV file are text, and nothing is taken for a number, a date or a null.
"""

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "messages")
RESPONSE_COLUMNS = ("response", "answer", "completion", "output")

Row = dict[str, Any]
Rows = tuple[list[Row], list[str]]  # and for each row its place


@dataclass(frozen=True)
class Source:
    """Rows, and for each the place to name in an error: file and line, or dataset and row."""

    name: str
    rows: list[Row]
    places: list[str]

    @cached_property
    def columns(self) -> list[str]:
        """Those of any row."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, wanted: str | None, usual: tuple[str, ...], flag: str) -> str:
        """The wanted column, or the first of the usual names that is there.

        Raises:
            ValueError: it is missing; the message lists the columns there are.
        """
        name = self.column_if_any(wanted, usual, flag)
        if name is None:
            raise ValueError(
                f"{self.name} has no column {' / '.join(usual)}; its columns are {', '.join(self.columns)}. "
                f"Name one with {flag}."
            )
        return name

    def column_if_any(self, wanted: str | None, usual: tuple[str, ...], flag: str) -> str | None:
        """As `column`, but None when no name was wanted and none of the usual ones is there."""
        if wanted is not None and wanted not in self.columns:
            raise ValueError(
                f"{self.name} has no column {wanted}; its columns are {', '.join(self.columns)}. Name one with {flag}."
            )
        return wanted or next((name for name in usual if name in self.columns), None)

    def prompts(self, column: str, wanted: str | None) -> list[Any]:
        """The cells of a prompt column.

        An `instruction` that nobody wanted by name is Alpaca's: a row's `input` belongs to it, after a blank line.

        Raises:
            ValueError: names the place of an instruction or an input that is no text.
        """
        if wanted is None and column == "instruction" and "input" in self.columns:
            return [at(place, _alpaca, row) for row, place in zip(self.rows, self.places, strict=True)]
        return [row.get(column) for row in self.rows]


def load_source(
    name: str, *, subset: str | None = None, split: str = "train", max_samples: int | None = None
) -> Source:
    """The rows of a file, of all files of a folder in the order of their names, or of a hub dataset.

    Args:
        subset, split: of a hub dataset; a file has neither.

    Raises:
        ValueError: no such file or dataset, a malformed line, or no rows at all.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in READERS)
        if not files:
            raise ValueError(f"{name} is a folder without a {', '.join(READERS)} file.")
    elif path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        files = [path]
    elif path.is_file():
        raise ValueError(f"{path} is none of the file types that are read: {', '.join(READERS)}.")
    else:
        files = []
    rows, places = [], []
    for file in files:
        more = READERS[file.suffix](file)
        if not more[0]:
            raise ValueError(f"{file} holds no rows.")
        rows, places = rows + more[0], places + more[1]
    if not files:
        rows, places = _numbered(name, _library(name, name, name=subset, split=split))
    if not rows:
        raise ValueError(f"{name} holds no rows.")
    return Source(name, rows[:max_samples], places[:max_samples])


def mixed_rows(sizes: list[int], weights: list[float] | None, *, seed: int) -> list[int]:
    """Which rows of several sources, laid end to end, are used.

    Args:
        sizes: rows of each source.
        weights: shares of the sources; None for every row of every source.

    Returns:
        Row numbers, ascending. With weights as many as there can be without taking a row twice, drawn from `seed`.

    Raises:
        ValueError: a weight so small that no row of its source is left.
    """
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    if weights is None:
        return list(range(sum(sizes)))
    total = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [int(total * weight / sum(weights) + 1e-9) for weight in weights]
    if 0 in counts:
        raise ValueError(f"data.weights={weights} leaves no row of source {counts.index(0) + 1}, of {sizes} rows each.")
    generator = torch.Generator().manual_seed(seed)
    picked = [
        start + row
        for start, size, count in zip(starts, sizes, counts, strict=True)
        for row in torch.randperm(size, generator=generator)[:count].tolist()
    ]
    return sorted(picked)


def split_rows(num_rows: int, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Numbers to train on and numbers held out, drawn from `seed`.

    Raises:
        ValueError: one of the two would be empty.
    """
    held_out = round(num_rows * fraction)
    if not 0 < held_out < num_rows:
        raise ValueError(f"data.eval_fraction={fraction} of {num_rows} prompts leaves nothing on one side.")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def mixture(names: list[str], sizes: list[int], rows: list[int]) -> list[str]:
    """How many rows of each source are among `rows`, a line each, for the user to read."""
    lines, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        used = sum(start <= row < start + size for row in rows)
        lines.append(f"{used} of {size} rows of {name} are used (data.weights).")
        start += size
    return lines


def at(place: str, function: Callable, *args) -> Any:
    """`function(*args)`, its ValueError with the place in front."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _jsonl(path: Path) -> Rows:
    rows, places = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                rows.append(_row(json.loads(line), place))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{place}: not valid JSON in UTF-8 ({error}).") from error
            places.append(place)
    return rows, places


def _json(path: Path) -> Rows:
    text = _text(path)
    start = text.lstrip()[:1]
    if start == "{":  # one object per line goes by this name too
        return _jsonl(path)
    if not start:
        return [], []
    if start != "[":
        raise ValueError(f"{path}: a JSON file of rows begins with [ or {{.")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error}).") from error
    rows, places = _numbered(str(path), values)
    return [_row(value, place) for value, place in zip(rows, places, strict=True)], places


def _csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)  # of its own, the module stops at cells of 128 KiB
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header, rows, places, line = None, [], [], 1
    try:
        for cells in reader:
            place, line = f"{path}, line {line}", reader.line_num + 1  # a row of several lines is found at its first
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{place}: two columns have one name: {', '.join(header)}.")
            elif len(cells) != len(header):
                raise ValueError(f"{place}: {len(cells)} cells, and {len(header)} columns ({', '.join(header)}).")
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                places.append(place)
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not valid CSV ({error}).") from error
    return rows, places


def _parquet(path: Path) -> Rows:
    return _numbered(str(path), _library("parquet", str(path), data_files=str(path), split="train"))


READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _alpaca(row: Row) -> Any:
    instruction, given = row.get("instruction"), row.get("input")
    if given is None or given == "":
        return instruction
    if not isinstance(instruction, str) or not isinstance(given, str):
        raise ValueError(
            f"instruction and input make one prompt, so both are text; these are {str(instruction)[:40]!r} and "
            f"{str(given)[:40]!r}. --data.prompt_column instruction takes it without the input."
        )
    return f"{instruction}\n\n{given}"


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not valid UTF-8 ({error}).") from error


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a row is a JSON object, this is a {type(value).__name__}.")
    return value


def _numbered(name: str, rows: list[Row]) -> Rows:
    return rows, [f"{name}, row {number}" for number in range(1, len(rows) + 1)]


def _library(loader: str, shown: str, **options: Any) -> list[Row]:
    try:
        return load_dataset(loader, **options).to_list()
    except Exception as error:  # datasets raises many kinds; each means that the user's source did not load
        if "corresponds to no data" in str(error):  # a table without rows
            return []
        raise ValueError(f"{shown} did not load: {type(error).__name__}: {error}") from error
