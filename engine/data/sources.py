"""Files and hub names -> rows that know where they came from, so that a bad one is an error with file and line.

source = load_source("train.jsonl")          # also .json, .csv, .parquet, or a hub name such as openai/gsm8k
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "messages")
FILE_TYPES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows, and for each the place to name in an error: file and line, or dataset and row."""

    name: str
    rows: list[Row]
    places: list[str]

    def column(self, wanted: str | None, usual: tuple[str, ...], flag: str) -> str:
        """The wanted column, or the first of the usual names that is there.

        Raises:
            ValueError: it is missing; the message lists the columns there are.
        """
        candidates = (wanted,) if wanted is not None else usual
        for name in candidates:
            if name in self.rows[0]:
                return name
        raise ValueError(
            f"{self.name} has no column {' / '.join(candidates)}; its columns are {', '.join(self.rows[0])}. "
            f"Name one with {flag}."
        )


def load_source(
    name: str, *, subset: str | None = None, split: str = "train", max_samples: int | None = None
) -> Source:
    """The rows of a file or a hub dataset.

    Args:
        subset, split: of a hub dataset; a file has neither.

    Raises:
        ValueError: no such file or dataset, a malformed line, or no rows at all.
    """
    path = Path(name).expanduser()
    if path.suffix == ".jsonl":
        rows, places = _jsonl(path)
    else:
        if path.suffix in FILE_TYPES:
            if not path.is_file():
                raise ValueError(f"{path}: there is no such file.")
            rows = _library(FILE_TYPES[path.suffix], name, data_files=str(path), split="train")
        else:
            if path.is_file():
                raise ValueError(f"{path} is none of the file types that are read: .jsonl, {', '.join(FILE_TYPES)}.")
            rows = _library(name, name, name=subset, split=split)
        places = [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
    if not rows:
        raise ValueError(f"{name} holds no rows.")
    return Source(name, rows[:max_samples], places[:max_samples])


def _jsonl(path: Path) -> tuple[list[Row], list[str]]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    rows, places = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON in UTF-8 ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row is a JSON object, this is a {type(row).__name__}.")
            rows.append(row)
            places.append(f"{path}, line {number}")
    return rows, places


def _library(loader: str, shown: str, **options: Any) -> list[Row]:
    try:
        return load_dataset(loader, **options).to_list()
    except Exception as error:  # datasets raises many kinds; each means that the user's source did not load
        raise ValueError(f"{shown} did not load: {type(error).__name__}: {error}") from error
