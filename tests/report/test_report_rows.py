"""What of a run's files gets into the page: columns with gaps, thinned texts, broken lines, names of runs."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from written_runs import HOSTILE, write_lines, write_run

from engine.report import report_page, write_report
from engine.report.page import embedded, run_names
from engine.report.rows import LONGEST_TEXT, MOST_POINTS, curves, rows_of, thinned
from engine.report.run_folder_data import run_folder_data

ROOT = Path(__file__).resolve().parents[2]


def data_of(page: str) -> dict:
    """What the page's scripts read."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_columns_have_gaps_where_a_number_is_not_finite_and_their_own_iterations_where_rows_lack_them():
    rows = [
        {"iteration": 2, "a": 2.5, "eval/b": 7},
        {"iteration": 1, "a": 1.0, "name": "text"},
        {"iteration": 3, "a": None},
    ]
    assert curves(rows) == {
        "x": [1, 2, 3],
        "columns": {"a": {"y": [1.0, 2.5, None]}, "eval/b": {"y": [7], "x": [2]}},
        "rows_per_point": 1,
    }


def test_of_rows_with_one_iteration_the_last_counts():
    assert curves([{"iteration": 1, "a": 1}, {"iteration": 1, "a": 5}])["columns"]["a"]["y"] == [5]


def test_very_many_rows_become_means_of_neighbours():
    rows = [{"iteration": i, "a": float(i), "gap": None} for i in range(1, 2 * MOST_POINTS + 1)]
    found = curves(rows)
    assert found["rows_per_point"] == 2
    assert found["x"][:2] == [2, 4] and found["x"][-1] == 2 * MOST_POINTS
    assert found["columns"]["a"]["y"][:2] == [1.5, 3.5]
    assert found["columns"]["gap"]["y"][0] is None


def test_broken_lines_are_counted_and_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(
        '{"iteration": 1, "a": NaN}\n\n{"no": 1}\n[1]\n{"iteration": 2, "text": "x\u2028y"}\n{"iterat', "utf-8"
    )
    found = rows_of(path)
    assert found.rows == [{"iteration": 1, "a": None}, {"iteration": 2, "text": "x\u2028y"}]
    assert found.unreadable == 3
    assert rows_of(tmp_path / "none.jsonl").rows == []


def test_numbers_are_short_and_endless_texts_are_cut(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"iteration": 1, "n": 0.123456789, "t": "w" * (LONGEST_TEXT + 5)}])
    (row,) = rows_of(tmp_path / "rows.jsonl").rows
    assert row["n"] == 0.123457
    assert row["t"].endswith(f"w … ({LONGEST_TEXT + 5:,} characters in all)") and len(row["t"]) < LONGEST_TEXT + 40


def test_samples_are_thinned_evenly_with_first_and_last():
    rows = [{"iteration": i, "response": "r" * 100} for i in range(1, 101) for _ in range(2)]
    found = thinned(rows, most_characters=6000)
    iterations = sorted({row["iteration"] for row in found["rows"]})
    assert found["iterations"] == 100
    assert iterations[0] == 1 and iterations[-1] == 100 and 10 < len(iterations) < 30
    steps = [b - a for a, b in pairwise(iterations)]
    assert max(steps) - min(steps) <= 1
    assert len(found["rows"]) == 2 * len(iterations)
    assert thinned(rows)["rows"] == rows


def test_a_folder_without_files_gives_a_page_that_says_nothing_is_there(tmp_path):
    data = run_folder_data(tmp_path, "empty")
    assert data["metrics"]["columns"] == {} and data["notes"] == []
    assert data["config"] is None and data["versions"] is None and data["memory_plan"] is None


def test_broken_files_cost_a_note_each(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1")
    (tmp_path / "memory_plan.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"iteration": 1, "score/mean": 1}\n')
    notes = run_folder_data(tmp_path, "broken")["notes"]
    assert [note.split()[0].rstrip(":") for note in notes] == ["metrics.jsonl", "config.yaml", "memory_plan.json"]


def test_the_page_holds_texts_as_they_are_and_no_end_of_script(tmp_path):
    write_run(tmp_path / "run")
    page = report_page([tmp_path / "run"])
    assert HOSTILE not in page
    (run,) = data_of(page)["runs"]
    assert run["samples"]["rows"][2]["prompt"] == HOSTILE
    assert run["settings"]["actor.learning_rate"] == "0.00025"
    assert embedded("</script><!-- &") == '"\\u003c/script\\u003e\\u003c!-- \\u0026"'


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"iteration": 1, "prompt": "\\ud83d", "response": "x"}\n')
    assert write_report([tmp_path]).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_names_of_runs_are_as_long_as_it_takes(tmp_path):
    folders = [tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"]
    assert run_names(folders[:1]) == ["ppo"]
    assert run_names(folders) == ["a/ppo", "b/ppo"]
    assert run_names([folders[0], folders[0]]) == ["ppo (1)", "ppo (2)"]


def test_what_is_no_folder_and_what_cannot_be_written_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; give the --output_dir of a run"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"cannot be written.*Name another --output"):
        write_report([tmp_path], tmp_path / "no" / "such" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot be written"):
        write_report([tmp_path], tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_command_writes_the_report_and_says_where(tmp_path):
    write_run(tmp_path / "run", iterations=2)
    command = [sys.executable, "launch/report.py"]
    told = dict(cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    done = subprocess.run([*command, str(tmp_path / "run")], **told)
    assert done.stdout.strip() == f"Report: {tmp_path / 'run' / 'report.html'}"
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    failed = subprocess.run([*command, str(tmp_path / "none")], **told)
    assert failed.returncode == 2 and "none is not a folder" in failed.stderr
