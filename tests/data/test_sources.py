"""sources.py: what a file must look like, and where an error says the fault lies."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from engine.data.sources import PROMPT_COLUMNS, load_source

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two, or so", "answer": 2}, {"prompt": "drei ä", "answer": 3}]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, kind) -> None:
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text('prompt,answer\none,1\n"two, or so",2\ndrei ä,3\n', encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    write(path, kind)
    source = load_source(str(path))
    assert source.rows == ROWS
    assert len(source.places) == 3
    assert all(str(path) in place and str(number) in place for number, place in enumerate(source.places, start=1))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_max_samples_keeps_the_first_rows(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    write(path, kind)
    assert load_source(str(path), max_samples=2).rows == ROWS[:2]
    assert load_source(str(path), max_samples=9).rows == ROWS


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n   \n{"prompt": "b"}\n')
    source = load_source(str(path))
    assert source.rows == [{"prompt": "a"}, {"prompt": "b"}]
    assert source.places == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize(
    "broken", ['{"prompt": "a"', "prompt: a", '{"prompt": "a"} {"prompt": "b"}', "{'prompt': 'a'}"]
)
def test_a_broken_line_is_named_with_file_and_number(tmp_path, broken):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + broken + "\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 3: not valid JSON"):
        load_source(str(path))


def test_a_line_that_is_not_utf8_is_named_with_file_and_number(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2"):
        load_source(str(path))


@pytest.mark.parametrize(("line", "kind"), [("[1, 2]", "list"), ('"text"', "str"), ("7", "int"), ("null", "NoneType")])
def test_a_row_that_is_no_object_is_named_with_file_and_number(tmp_path, line, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{kind}"):
        load_source(str(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_file_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"nowhere\.{kind}: there is no such file"):
        load_source(str(tmp_path / f"nowhere.{kind}"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_an_empty_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / f"nothing.{kind}"
    path.write_text("")
    with pytest.raises(ValueError, match=rf"nothing\.{kind}"):
        load_source(str(path))


def test_a_file_of_blank_lines_or_no_rows_is_refused_by_name(tmp_path):
    blank, table = tmp_path / "blank.jsonl", tmp_path / "table.parquet"
    blank.write_text("\n  \n")
    with pytest.raises(ValueError, match=r"blank\.jsonl holds no rows"):
        load_source(str(blank))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), table)
    with pytest.raises(ValueError, match=r"table\.parquet"):  # datasets cannot load it, and says so less clearly
        load_source(str(table))


def test_a_hub_name_that_does_not_load_is_named():
    with pytest.raises(ValueError, match="nobody/nothing-of-the-kind did not load"):
        load_source("nobody/nothing-of-the-kind")


# Columns


def source_with(tmp_path, **row):
    path = tmp_path / "columns.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_source(str(path))


def test_the_wanted_column_wins_over_the_usual_ones(tmp_path):
    source = source_with(tmp_path, prompt="a", story="b")
    assert source.column("story", PROMPT_COLUMNS, "--data.prompt_column") == "story"


@pytest.mark.parametrize("name", ["prompt", "question", "query", "instruction", "messages"])
def test_the_usual_columns_are_found(tmp_path, name):
    source = source_with(tmp_path, other="a", **{name: "b"})
    assert source.column(None, PROMPT_COLUMNS, "--data.prompt_column") == name


@pytest.mark.parametrize("wanted", [None, "prompts"])
def test_a_missing_column_lists_the_columns_there_are(tmp_path, wanted):
    source = source_with(tmp_path, story="a", answer="b")
    with pytest.raises(ValueError, match=r"story, answer.*--data\.prompt_column") as error:
        source.column(wanted, PROMPT_COLUMNS, "--data.prompt_column")
    assert (wanted or "question") in str(error.value)


def test_a_file_of_another_type_is_named_with_the_types_there_are(tmp_path):
    (tmp_path / "p.txt").write_text("a prompt")
    with pytest.raises(
        ValueError, match=r"p\.txt is none of the file types that are read: \.jsonl, \.json, \.csv, \.parquet"
    ):
        load_source(str(tmp_path / "p.txt"))
