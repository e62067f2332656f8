"""The run that faults are done to, and a table at the end: what became of it each time."""

from collections import defaultdict

import ppo_runs
import pytest


@pytest.fixture
def tally(record_property):
    """`tally(fault, recovered=..., iterations_lost=..., rows_lost=...)`: one run."""
    return lambda fault, **outcome: record_property("fault", [fault, outcome])


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The file of the run that the faults are done to."""
    return ppo_runs.recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    """What that run leaves when nothing happens to it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ppo_runs.finish(recipe, out)
    return ppo_runs.outcome(out)


def pytest_terminal_summary(terminalreporter):
    told = defaultdict(list)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "fault" and report.when == "call":
                fault, outcome = value
                told[fault].append(outcome)
    if not told:
        return
    write = terminalreporter.write_line
    write("")
    write("| Fault | Runs | Recovered | Iterations computed again | Rows lost |")
    write("|---|---|---|---|---|")
    for fault, runs in told.items():
        recovered, again, rows = (
            sum(run[name] for run in runs) for name in ("recovered", "iterations_lost", "rows_lost")
        )
        write(f"| {fault} | {len(runs)} | {recovered} | {again} | {rows} |")
