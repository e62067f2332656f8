"""Checks of the data: it can be read, every row is what the stage takes, and the limits leave enough of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.doctor.findings import Finding, failed, of_each, ok, warning, with_remedy
from engine.doctor.subject import Subject

LOOKED_AT = 2000  # rows of a source that are tokenised, evenly spread; all are read
MOST_TOO_LONG = 0.05  # the share of rows above which dropping or shortening them is no detail


@dataclass(frozen=True)
class Part:
    """One source of a run.

    Attributes:
        settings: its group, a DataConfig.
        named: the setting that names it.
        responses: whether its rows hold any; those of PPO's prompts do not.
        most: only the first so many rows are read.
    """

    settings: Any
    named: str
    name: str
    split: str
    responses: bool
    most: int | None


@with_remedy("Correct the data, or name another file or column: --data.train, --data.prompt_column.")
def data_rows(subject: Subject) -> Finding:
    """Every source is there, has the columns, and holds rows of the right form."""
    return of_each(_parts(subject), lambda part: ok(f"{len(_read(subject, part)[1])} rows in {part.name}"))


def enough_rows(subject: Subject) -> Finding:
    """At least as many as one iteration takes."""
    config = subject.config
    have = sum(len(_read(subject, part)[1]) for part in _parts(subject) if part.named == "data.train")
    want = config.prompts_per_iteration if subject.is_ppo else config.minibatch_size
    if have < want:
        said = f"{have} rows are fewer than the {want} that one iteration takes: each takes all of them, once."
        return warning(said, "Add data, or lower the batch sizes.")
    return ok(f"{have}, {want} for each iteration")


@with_remedy("Name a file with a template that writes these conversations: --data.chat_template.")
def chat_template(subject: Subject) -> Finding | None:
    """It writes the conversations that the data holds, and ends an answer with what ends a sequence."""
    return subject.once("the chat template", lambda: _template(subject))


@with_remedy("Set --data.over_length truncate_left, or raise --data.max_prompt_tokens.")
def prompt_lengths(subject: Subject) -> Finding:
    """How much of the data the limits in tokens leave out."""
    chat_template(subject)
    return of_each(_parts(subject), lambda part: _lengths(subject, part))


def prompts_and_columns(subject: Subject, number: int) -> tuple[list[Any], dict[str, list[Any]]]:
    """Of the first rows of PPO's data."""
    source, rows = _read(subject, next(_parts(subject)))
    columns = {name: [row.get(name) for row in source.rows[:number]] for name in source.columns}
    return [row[0][0] for row in rows[:number]], columns


def _parts(subject: Subject) -> Iterator[Part]:
    config, data = subject.config, subject.config.data
    for name in data.sources:
        yield Part(data, "data.train", name, data.train_split, not subject.is_ppo, data.max_samples)
    if data.eval is not None:
        most = config.evaluation.num_prompts if subject.is_ppo else data.max_samples
        yield Part(data, "data.eval", data.eval, data.eval_split, not subject.is_ppo, most)
    if subject.is_ppo and config.pretraining is not None:
        mix = config.pretraining.data
        for name in mix.sources:
            yield Part(mix, "pretraining.data.train", name, mix.train_split, True, mix.max_samples)


def _read(subject: Subject, part: Part) -> tuple[Any, list[list[tuple[Any, str]]]]:
    """(source, of each row its prompts with their responses, which are empty in PPO's data)."""
    return subject.once(f"the rows of {part.named} {part.name}", lambda: _rows(subject, part))


def _rows(subject: Subject, part: Part) -> tuple[Any, list[list[tuple[Any, str]]]]:
    from engine.config import PreferenceDataConfig
    from engine.data.columns import demonstrations, preferences
    from engine.data.formatting import as_prompt, unanswered
    from engine.data.sources import PROMPT_COLUMNS, at, load_source

    settings = part.settings
    options = dict(subset=settings.train_subset, split=part.split, max_samples=part.most)
    try:
        source = load_source(part.name, **options)
        if part.responses:
            read = preferences if isinstance(settings, PreferenceDataConfig) else demonstrations
            return source, read(source, settings).exchanges
        column = source.column(settings.prompt_column, PROMPT_COLUMNS, "--data.prompt_column")
        cells = source.prompts(column, settings.prompt_column)
        places = [f"{place}, column {column!r}" for place in source.places]
        prompts = [
            at(place, as_prompt, at(place, unanswered, cell), settings.prompt_format)
            for place, cell in zip(places, cells, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"{part.named}: {error}") from error
    return source, [[(prompt, "")] for prompt in prompts]


def _template(subject: Subject) -> Finding | None:
    from engine.data.formatting import render, render_response
    from engine.data.sources import at

    tokenizer, seen = subject.tokenizer(subject.main_role), None
    for part in _parts(subject):
        source, rows = _read(subject, part)
        talks = [
            (place, row[0][0]) for place, row in zip(source.places, rows, strict=True) if row[0][0].__class__ is list
        ]
        for place, prompt in talks[:1]:
            at(place, render, prompt, tokenizer)
            seen = at(place, render_response, prompt, "yes", tokenizer)
    if seen is None:
        return None
    if tokenizer.eos_token not in seen:
        return warning(
            f"the chat template ends an answer with {seen.removeprefix('yes')!r}, without the "
            f"{tokenizer.eos_token!r} that ends a sequence of this tokenizer.",
            "Name another with --data.chat_template, or correct eos_token in tokenizer_config.json.",
        )
    return ok(f"an answer ends with {seen.removeprefix('yes')!r}")


def _lengths(subject: Subject, part: Part) -> Finding:
    from engine.data.exchanges import check_end_can_go
    from engine.data.formatting import encode, encode_exchange, render, render_response
    from engine.data.sources import at

    settings, tokenizer = part.settings, subject.tokenizer(subject.main_role)
    source, rows = _read(subject, part)
    step = -(-len(rows) // LOOKED_AT)
    longest_prompt, longest_row, too_long = 0, 0, []
    for place, row in list(zip(source.places, rows, strict=True))[::step]:
        for prompt, response in row:
            text = at(place, render, prompt, tokenizer)
            if part.responses:
                ids, answer = encode_exchange(text, at(place, render_response, prompt, response, tokenizer), tokenizer)
            else:
                ids, answer = at(place, encode, text, tokenizer), []
            longest_prompt, longest_row = max(longest_prompt, len(ids)), max(longest_row, len(ids) + len(answer))
            over = part.responses and len(ids) + len(answer) > settings.max_length
            if over or len(ids) > settings.max_prompt_tokens:
                at(place, check_end_can_go, prompt, settings.over_length)
                too_long += [place] if place not in too_long[-1:] else []
    number = len(rows[::step])
    share, group = len(too_long) / number, part.named.rsplit(".", 1)[0]
    limit = f"{group}.max_prompt_tokens={settings.max_prompt_tokens}"
    limit += f" or {group}.max_length={settings.max_length}" if part.responses else ""
    spread = f" (of {len(rows)}, evenly spread)" if step > 1 else ""
    said = f"{len(too_long)} of {number} rows{spread} of {part.name}, {share:.1%}, exceed {limit}"
    higher = []
    if longest_prompt > settings.max_prompt_tokens:
        higher.append(f"--{group}.max_prompt_tokens (the longest prompt has {longest_prompt})")
    if part.responses and longest_row > settings.max_length:
        higher.append(f"--{group}.max_length (the longest row has {longest_row})")
    remedy = f"Raise {' and '.join(higher)}."
    if too_long and settings.over_length == "error":
        return failed(f"{said}, the first at {too_long[0]}, and {group}.over_length is error.", remedy)
    if share == 1 and settings.over_length == "drop":
        return failed(f"{said}: dropping them leaves nothing.", remedy)
    if share > MOST_TOO_LONG:
        return warning(f"{said}: over_length is {settings.over_length}.", remedy)
    return ok(f"{said}; the longest prompt has {longest_prompt} tokens")


CHECKS = [data_rows, enough_rows, chat_template, prompt_lengths]
