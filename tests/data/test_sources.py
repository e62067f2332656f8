"""sources.py: what a file must look like, and where an error says the fault lies."""

import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.sources import (
    PROMPT_COLUMNS,
    RESPONSE_COLUMNS,
    load_source,
    mixed_rows,
    mixture,
    split_rows,
)

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two, or so", "answer": 2}, {"prompt": "drei ä", "answer": 3}]
AS_TEXT = [row | {"answer": str(row["answer"])} for row in ROWS]  # what a CSV file can say of them


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
    assert source.rows == (AS_TEXT if kind == "csv" else ROWS)
    counted = dict(jsonl="line 1 2 3", csv="line 2 3 4").get(kind, "row 1 2 3").split()
    assert source.places == [f"{path}, {counted[0]} {number}" for number in counted[1:]]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_max_samples_keeps_the_first_rows(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    write(path, kind)
    rows = AS_TEXT if kind == "csv" else ROWS
    assert load_source(str(path), max_samples=2).rows == rows[:2]
    assert load_source(str(path), max_samples=9).rows == rows


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


# Cells are what the file says


@pytest.mark.parametrize("cell", ["007", "1.50", "None", "NA", "nan", "", "2020-01-01", "true", " blank ", "1e5"])
def test_a_cell_of_text_stays_the_text_it_is(tmp_path, cell):
    row = {"prompt": "a", "answer": cell}
    for name, text in (
        ("rows.csv", f"prompt,answer\na,{cell}\n"),
        ("rows.json", json.dumps([row])),
        ("rows.jsonl", json.dumps(row)),
    ):
        (tmp_path / name).write_text(text)
        assert load_source(str(tmp_path / name)).rows == [row]


def test_json_keeps_numbers_nulls_and_rows_of_different_columns(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 0.5, "by": None}, {"prompt": ["c", 1]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load_source(str(tmp_path / "rows.json")).rows == rows


def test_json_with_one_object_per_line_is_read_line_by_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert load_source(str(path)).places == [f"{path}, line 1", f"{path}, line 3"]


def test_rows_of_a_csv_file_are_found_at_their_first_line(tmp_path):
    path = tmp_path / "long.csv"
    path.write_bytes('\ufeffprompt,answer\r\n"one\r\n\r\ntwo",1\r\n\r\n"a ""b""",2\r\nc,3'.encode())
    source = load_source(str(path))
    assert [row["prompt"] for row in source.rows] == ["one\r\n\r\ntwo", 'a "b"', "c"]
    assert [row["answer"] for row in source.rows] == ["1", "2", "3"]
    assert source.places == [f"{path}, line {number}" for number in (2, 6, 7)]


def test_a_long_cell_of_a_csv_file_is_read_whole(tmp_path):
    (tmp_path / "long.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(load_source(str(tmp_path / "long.csv")).rows[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.csv", b'p,a\n"x\ny",1\nb\n', r"line 4: 1 cells, and 2 columns \(p, a\)"),
        ("r.csv", b"p,a\nx,1,2\n", r"line 2: 3 cells, and 2 columns"),
        ("r.csv", b"p,a,p\nx,1,2\n", r"line 1: two columns have one name: p, a, p"),
        ("r.csv", b'p,a\nx,1\n"y,2\nz,3\n', r"line 3: not valid CSV"),
        ("r.csv", b"p,a\nx,1\ncaf\xe9,2\n", r"line 3: not valid UTF-8"),
        ("r.json", b'[{"p": "a"},\n {"p": "b"\n]', r"line 3: not valid JSON"),
        ("r.json", b'[{"p": "a"},\n {"p": "caf\xe9"}]', r"line 2: not valid UTF-8"),
        ("r.json", b'[{"p": "a"}, "b"]', r"row 2: a row is a JSON object, this is a str"),
    ],
)
def test_a_broken_table_is_named_with_file_and_number(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}, " + said):
        load_source(str(tmp_path / name))


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


def test_the_columns_are_those_of_every_row(tmp_path):
    path = tmp_path / "ragged.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "story": "a"}\n')
    source = load_source(str(path))
    assert source.column("story", PROMPT_COLUMNS, "--data.prompt_column") == "story"
    with pytest.raises(ValueError, match=r"its columns are id, story"):
        source.column(None, PROMPT_COLUMNS, "--data.prompt_column")


def test_a_file_of_another_type_is_named_with_the_types_there_are(tmp_path):
    (tmp_path / "p.txt").write_text("a prompt")
    with pytest.raises(
        ValueError, match=r"p\.txt is none of the file types that are read: \.jsonl, \.json, \.csv, \.parquet"
    ):
        load_source(str(tmp_path / "p.txt"))


def test_an_optional_column_is_none_only_when_nobody_asked_for_it(tmp_path):
    source = source_with(tmp_path, story="a", answer="b")
    assert source.column_if_any(None, RESPONSE_COLUMNS, "--data.response_column") == "answer"
    assert source.column_if_any(None, PROMPT_COLUMNS, "--data.prompt_column") is None
    assert source.column_if_any("story", PROMPT_COLUMNS, "--data.prompt_column") == "story"
    with pytest.raises(ValueError, match=r"no column margin; its columns are story, answer.*--data\.margin_column"):
        source.column_if_any("margin", (), "--data.margin_column")


@pytest.mark.parametrize(
    ("usual", "in_order"),
    [
        (PROMPT_COLUMNS, ["prompt", "question", "query", "instruction", "messages"]),
        (RESPONSE_COLUMNS, ["response", "answer", "completion", "output"]),
    ],
)
def test_of_several_usual_columns_the_first_is_taken(tmp_path, usual, in_order):
    for first, later in itertools.pairwise(in_order):
        assert source_with(tmp_path, **{later: "b", first: "a"}).column(None, usual, "--flag") == first


# Folders, and files without rows


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("c.csv", "a.parquet", "d.jsonl", "b.json"):
        write(folder / name, name[2:])
    (folder / "README.md").write_text("not data")
    source = load_source(str(folder))
    assert source.rows == ROWS * 2 + AS_TEXT + ROWS
    files = [folder / name for name in ("a.parquet", "b.json", "c.csv", "d.jsonl") for _ in ROWS]
    assert all(str(file) in place for file, place in zip(files, source.places, strict=True))
    assert [int(place.rpartition(" ")[2]) for place in source.places] == [1, 2, 3] * 2 + [2, 3, 4] + [1, 2, 3]


def test_a_folders_samples_are_counted_over_all_files(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", "jsonl")
    source = load_source(str(tmp_path), max_samples=4)
    assert source.rows == ROWS + ROWS[:1]
    assert source.places[-1] == f"{tmp_path / 'b.jsonl'}, line 1"


def test_a_folder_without_data_is_refused_with_the_types_there_are(tmp_path):
    (tmp_path / "p.txt").write_text("a prompt")
    with pytest.raises(ValueError, match=r"is a folder without a \.jsonl, \.json, \.csv, \.parquet file"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.json", "[]", "rows.json holds no rows"),
        ("rows.json", "", "rows.json holds no rows"),
        ("rows.csv", "prompt,answer\n", "rows.csv holds no rows"),
        ("rows.csv", "", "rows.csv holds no rows"),
        ("rows.jsonl", "", "holds no rows"),
    ],
)
@pytest.mark.parametrize("in_a_folder", [True, False])
def test_a_file_without_rows_is_refused_alone_or_in_a_folder(tmp_path, name, text, said, in_a_folder):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_source(str(folder if in_a_folder else folder / name))


# Which rows of several sources


def test_without_weights_every_row_is_used():
    assert mixed_rows([2, 1, 3], None, seed=0) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([10, 20], [1, 1], [10, 10]),
        ([10, 20], [2, 1], [10, 5]),
        ([10, 20], [1, 4], [5, 20]),
        ([10, 20, 70], [0.1, 0.2, 0.7], [10, 20, 70]),  # 0.1 + 0.2 + 0.7 is not 1: no row may get lost in rounding
        ([3, 3, 3], [0.1, 0.1, 0.1], [3, 3, 3]),
        ([7, 100], [3, 4], [7, 9]),  # 7 * 4 / 3 = 9.33
        ([5], [0.3], [5]),
    ],
)
def test_the_scarcest_source_sets_the_counts(sizes, weights, counts):
    rows = mixed_rows(sizes, weights, seed=0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    used = [sum(row in range(start, start + size) for row in rows) for start, size in zip(starts, sizes, strict=True)]
    assert used == counts and len(rows) == sum(counts)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.3, 3)), min_size=1, max_size=4), st.integers(0, 9))
def test_a_mixture_is_ascending_takes_no_row_twice_and_uses_a_source_up(parts, seed):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    whole = min(size * sum(weights) / weight for size, weight in parts)
    if min(whole * weight / sum(weights) for weight in weights) < 1.001:
        return  # a source without rows: refused, see below
    rows = mixed_rows(sizes, weights, seed=seed)
    assert all(one < following for one, following in itertools.pairwise(rows))
    assert rows[0] >= 0 and rows[-1] < sum(sizes)
    used, start = [], 0
    for size in sizes:
        used.append(sum(start <= row < start + size for row in rows))
        start += size
    assert any(count == size for count, size in zip(used, sizes, strict=True))
    for count, weight in zip(used, weights, strict=True):
        assert abs(count - whole * weight / sum(weights)) < 1 + 1e-6
    assert rows == mixed_rows(sizes, weights, seed=seed)


def test_which_rows_of_a_source_are_used_is_drawn_from_the_seed():
    drawn = [mixed_rows([5, 100], [1, 1], seed=seed) for seed in range(3)]
    assert len({str(rows) for rows in drawn}) == 3
    assert all(rows[:5] == [0, 1, 2, 3, 4] and len(rows) == 10 for rows in drawn)
    assert drawn[0][5:] != [5, 6, 7, 8, 9]


def test_a_weight_that_leaves_nothing_is_refused_with_its_source():
    with pytest.raises(ValueError, match=r"leaves no row of source 2, of \[10, 20\]"):
        mixed_rows([10, 20], [1, 0.05], seed=0)


def test_a_mixture_is_told_source_by_source():
    assert mixture(["a.jsonl", "b.jsonl", "c.jsonl"], [3, 2, 4], [0, 2, 3, 4, 8]) == [
        "2 of 3 rows of a.jsonl are used (data.weights).",
        "2 of 2 rows of b.jsonl are used (data.weights).",
        "1 of 4 rows of c.jsonl are used (data.weights).",
    ]


# Held out


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 80), st.integers(1, 79), st.integers(0, 5))
def test_a_split_is_disjoint_and_complete(num_rows, held_out, seed):
    if held_out >= num_rows:
        return
    kept, out = split_rows(num_rows, held_out / num_rows, seed=seed)
    assert len(out) == held_out
    assert sorted(kept + out) == list(range(num_rows))
    assert kept == sorted(kept) and out == sorted(out)
    assert (kept, out) == split_rows(num_rows, held_out / num_rows, seed=seed)


def test_which_rows_are_held_out_is_drawn_from_the_seed():
    parts = [split_rows(100, 0.1, seed=seed)[1] for seed in range(4)]
    assert len({str(out) for out in parts}) == 4
    assert list(range(10)) not in parts and list(range(90, 100)) not in parts


@pytest.mark.parametrize(("num_rows", "fraction"), [(4, 0.1), (4, 0.9), (1, 0.5), (10, 0.0)])
def test_a_split_with_nothing_on_one_side_is_refused(num_rows, fraction):
    with pytest.raises(ValueError, match=rf"data\.eval_fraction={fraction} of {num_rows} prompts leaves nothing"):
        split_rows(num_rows, fraction, seed=0)


@pytest.mark.parametrize("text", ["null", "3", '"a"'])
def test_a_json_file_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json: a JSON file of rows begins with"):
        load_source(str(tmp_path / "rows.json"))
