"""progress_bar.py and the summary: what a run says on a terminal, and where there is none."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path
from time import monotonic

import pytest
import ranks
from tracked import METRICS, NUM_ITERATIONS, config

from engine.tracking import Tracker

COMMAND = [sys.executable, str(Path(__file__).with_name("tracked.py"))]
ENVIRONMENT = {**os.environ, **ranks.OFFLINE}


def test_without_a_terminal_there_is_one_line_per_iteration(tmp_path):
    done = subprocess.run([*COMMAND, str(tmp_path)], cwd=ranks.ROOT, env=ENVIRONMENT, capture_output=True, check=True)
    assert done.stderr == b""
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", done.stdout), "control characters"
    lines = [line for line in done.stdout.decode().split("\n") if line.startswith("iteration ")]
    assert len(lines) == NUM_ITERATIONS
    form = r"iteration {}/4  score/mean {}  kl/ref_mean 0\.25  0\.50 s  1,234 tokens/s"
    for iteration, line in enumerate(lines, 1):
        left = r"  \d\d:\d\d left" if iteration > 1 else ""  # the first tells how long one takes
        assert re.fullmatch(form.format(iteration, f"{iteration / 2:g}") + left, line), line


def test_on_a_terminal_there_is_a_bar(tmp_path):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 160))
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path)], cwd=ranks.ROOT, env=ENVIRONMENT, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        said = _read(main, timeout_s=120)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    text = said.decode()
    assert "iteration 1/4" not in text, "the lines are for where there is no terminal"
    for phase in ("generate", "score", "train", "save"):
        assert re.search(rf"\r{phase}: ", text)
    assert re.search(
        r"\rsave: 100%\|█+\| 4/4 \[\d\d:\d\d, 00:00 left, score/mean 2  kl/ref_mean 0.25  1,234 tokens/s\]", text
    )
    assert re.search(r"\rWarning: iteration 2: hardly any response ends\.\r\n", text)


def _read(descriptor: int, *, timeout_s: float) -> bytes:
    """All there is, until the other end is closed."""
    said, deadline = b"", monotonic() + timeout_s
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - monotonic()))
        assert ready, f"no end came, but {said!r}"
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:
            return said
        if not chunk:
            return said
        said += chunk


def test_a_run_that_goes_on_counts_from_where_it_was(tmp_path, capsys):
    with Tracker(config(tmp_path, "disabled"), num_iterations=4, is_main=True, resumed_at=2) as tracker:
        assert tracker.bar.counted_from == 2
        tracker.log(3, METRICS, [])
        tracker.go_back_to(1)
        assert tracker.bar.counted_from == 1
        tracker.log(2, METRICS, [])
    assert "iteration 2/4" in capsys.readouterr().out


def summary_of(capsys) -> dict[str, str]:
    """Name -> what is said, of the lines after the first."""
    said = capsys.readouterr().out
    said = said[re.search(r"^(Done|Stopped)", said, flags=re.MULTILINE).start() :].rstrip("\n").split("\n")
    return {"": said[0]} | {line[2:24].strip(): line[24:] for line in said[1:]}


@pytest.mark.parametrize("last", [4, 2])
def test_the_end_is_summed_up(tmp_path, capsys, last):
    with Tracker(config(tmp_path, "disabled"), num_iterations=4, is_main=True) as tracker:
        for iteration in range(1, last + 1):
            score = None if iteration == last else iteration / 2
            tracker.log(iteration, METRICS | {"score/mean": score or float("nan")}, [{"iteration": 1}])
        tracker.warn(1, "no end", "hardly any response ends.")
        tracker.evaluation(0, {"eval/score_mean": 1.0}, [])
        tracker.evaluation(4, {"eval/score_mean": 3.0, "eval/score_std": 1.0, "eval/polite": 0.5}, [])
        for folder in ("model", "adapter"):
            (tmp_path / folder).mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    told = summary_of(capsys)
    assert told.pop("") == (
        "Done: 4 steps of SFT on model" if last == 4 else "Stopped after 2 of 4 steps of SFT on model"
    )
    ended = (
        {"models": f"{tmp_path}/adapter, {tmp_path}/model"}
        if last == 4
        else {"go on": "the same command with --resume auto"}
    )
    assert told == {
        "score/mean": "0.5 -> 1.5" if last == 4 else "0.5",  # the last that is a number
        "kl/ref_mean": "0.25 -> 0.25",
        "eval/score_mean": "1 -> 3",
        "eval/polite": "0.5",
        "warnings": f"1, in {tmp_path}/warnings.jsonl",
        **ended,
        "metrics": f"{tmp_path}/metrics.jsonl, {tmp_path}/samples.jsonl",
        "report": f"python launch/report.py {tmp_path}",
    }


def test_a_run_that_fails_ends_with_its_error(tmp_path, capsys):
    with pytest.raises(KeyError), Tracker(config(tmp_path, "disabled"), num_iterations=4, is_main=True):
        raise KeyError("mine")
    assert "Stopped after" not in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null_wherever_they_are(tmp_path):
    with Tracker(config(tmp_path, "disabled"), num_iterations=4, is_main=True) as tracker:
        tracker.token_view(1, {"logprobs": [-1.0, float("nan")], "values": None})
    (row,) = map(json.loads, (tmp_path / "token_views.jsonl").read_text().splitlines())
    assert row == {"iteration": 1, "logprobs": [-1.0, None], "values": None}
