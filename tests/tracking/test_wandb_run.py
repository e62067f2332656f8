"""wandb_run.py with the real wandb: what an offline run leaves, read by wandb's own reader."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ranks
import wandb_files
from tracked import METRICS, NUM_ITERATIONS, config

from engine.config import as_dict
from engine.tracking import Tracker

SAMPLES = [
    {"iteration": 1, "prompt": "Grüße", "response": "日本\n", "score": 2.0, "conversation": [{"role": "user"}]},
    {"iteration": 1, "prompt": "go", "response": "", "score": None},
]
EVALUATED = [{"prompt": "p", "response": "r", "score": 1.0, "initial_response": "s", "initial_score": 0.5}]
SCORES = [0.0, 1.0, 1.0, math.nan]
PLAN = {"world_size": 2, "peak_bytes": 7, "phases": {"train": {"peak_bytes": 7}}}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run that was gone on with after iteration 2."""
    folder = tmp_path_factory.mktemp("tracked") / "out"
    folder.mkdir()
    (folder / "memory_plan.json").write_text(json.dumps(PLAN))
    given = dict(num_iterations=3, is_main=True)
    with Tracker(config(folder, "offline"), **given) as tracker:
        tracker.evaluation(0, {"eval/score_mean": 0.5}, EVALUATED)
        for iteration in (1, 2):
            histograms = {"score/histogram": SCORES, "response/length_histogram": [3, 4, 5]}
            tracker.log(iteration, METRICS | {"score/mean": iteration / 2}, SAMPLES, histograms)
        tracker.warn(2, "no end", "hardly any response ends.")
    with Tracker(config(folder, "offline"), **given, resumed_at=2, wandb_id=tracker.wandb_id) as tracker:
        tracker.log(3, METRICS, [])
    return folder


def files(out: Path) -> list[Path]:
    """The .wandb files, oldest first."""
    return sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def test_metrics_are_there_by_iteration(out):
    rows = wandb_files.history(files(out)[0])
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/score_mean"] == 0.5
    assert [{name: row[name] for name in METRICS} for row in rows[1:]] == [
        METRICS | {"score/mean": 0.5},
        METRICS | {"score/mean": 1.0},
    ]


def test_the_iteration_is_the_axis_of_every_metric(out):
    for file in files(out):
        defined = wandb_files.of_type(file, "metric")
        assert [each["name"] for each in defined if "name" in each][:1] == ["iteration"]
        assert [each["step_metric"] for each in defined if each.get("glob_name") == "*"] == ["iteration"]


@pytest.mark.parametrize(("name", "row", "expected"), [("train", 1, SAMPLES), ("evaluation", 0, EVALUATED)])
def test_samples_are_tables(out, name, row, expected):
    file = files(out)[0]
    logged = wandb_files.history(file)[row]
    assert logged[f"samples/{name}._type"] == "table-file"
    table = json.loads((file.parent / "files" / logged[f"samples/{name}.path"]).read_text(encoding="utf-8"))
    assert table["columns"] == list(expected[0])
    texts = [
        {**each, "conversation": json.dumps(each["conversation"])} if "conversation" in each else each
        for each in expected
    ]
    assert table["data"] == [[each.get(column) for column in table["columns"]] for each in texts]


def test_scores_and_lengths_are_histograms(out):
    row = wandb_files.history(files(out)[0])[1]
    for name, count, lowest, highest in (("score/histogram", 3, 0, 1), ("response/length_histogram", 3, 3, 5)):
        assert row[f"{name}._type"] == "histogram"
        assert sum(row[f"{name}.values"]) == count  # of scores, NaN is none
        assert (row[f"{name}.bins"][0], row[f"{name}.bins"][-1]) == (lowest, highest)


def test_the_config_is_the_runs_with_commit_and_plan(out):
    held = wandb_files.config(files(out)[0])
    commit = json.loads((out / "versions.json").read_text())["git_commit"]
    assert held["memory_plan"] == PLAN and held["git_commit"] == commit
    settings = as_dict(config(out, "offline"))
    assert {name: held[name] for name in settings} == settings


def test_a_warning_is_an_alert(out):
    (alert,) = wandb_files.of_type(files(out)[0], "alert")
    assert (alert["title"], alert["text"]) == ("no end", "iteration 2: hardly any response ends.")
    assert alert["level"] == "WARN"


def test_a_run_goes_on_under_its_id(out):
    first, second = files(out)
    assert first.name == second.name
    assert {run["run_id"] for file in (first, second) for run in wandb_files.of_type(file, "run")} == {
        first.stem.removeprefix("run-")
    }
    assert [row["iteration"] for row in wandb_files.history(second)] == [3]
    for file in (first, second):
        (end,) = wandb_files.of_type(file, "exit")
        assert end.get("exit_code", 0) == 0


def test_nothing_is_left_in_the_environment(out):
    assert "WANDB_SERVICE" not in os.environ and "WANDB_DATA_DIR" not in os.environ


@contextmanager
def tracked(folder: Path, *flags: str, **environment: str):
    """`tracked.py` as a process that waits before its last iteration."""
    command = [sys.executable, str(Path(__file__).with_name("tracked.py")), str(folder), "--wait", *flags]
    given = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    given |= {name: value for name, value in ranks.OFFLINE.items() if name != "WANDB_MODE"} | environment
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ranks.ROOT, env=given, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen, text: str) -> str:
    """What it says, up to the line with this text."""
    said = ""
    while text not in said:
        line = process.stdout.readline()
        assert line, said + process.stderr.read()
        said += line
    return said


def test_a_launcher_that_ends_all_below_a_rank_does_not_end_its_wandb_run(tmp_path):
    """As the deepspeed launcher does on Ctrl-C, while the ranks finish their step."""
    with tracked(tmp_path, "--wandb", "offline") as process:
        until(process, "waiting")
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.terminate()
        said, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0 and "W&B failed" not in said
    (file,) = files(tmp_path)
    assert [row["iteration"] for row in wandb_files.history(file)] == list(range(1, NUM_ITERATIONS + 1))
    assert len(wandb_files.of_type(file, "exit")) == 1
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in said


def test_of_a_run_that_is_killed_the_file_can_be_read(tmp_path):
    with tracked(tmp_path, "--wandb", "offline") as process:
        until(process, "waiting")
        (file,) = files(tmp_path)
        _wait_until(lambda: _rows_so_far(file) == NUM_ITERATIONS - 1)  # while it runs
        process.kill()
        process.wait()
    assert [row["iteration"] for row in wandb_files.history(file)] == list(range(1, NUM_ITERATIONS))


def test_online_without_a_key_is_offline(tmp_path):
    with tracked(tmp_path / "out", "--wandb", "online", HOME=str(tmp_path)) as process:
        said, complained = process.communicate("\n", timeout=120)
    assert process.returncode == 0, complained
    (told,) = [line for line in said.splitlines() if line.startswith("W&B has no key here")]
    assert f"wandb sync {tmp_path}/out/wandb/offline-run-*" in told
    assert len(files(tmp_path / "out")) == 1


def _rows_so_far(file: Path) -> int:
    """Of a file that is being written: none, where the reader meets half a record."""
    try:
        return len(wandb_files.history(file))
    except (subprocess.CalledProcessError, json.JSONDecodeError):
        return 0


def _wait_until(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true")
