"""What became of the runs to which faults were done, as a table at the end."""

from collections import defaultdict

import pytest

TALLY = defaultdict(list)


@pytest.fixture
def tally():
    """`tally(fault, recovered=..., iterations_lost=..., rows_lost=...)`: one run."""
    return lambda fault, **outcome: TALLY[fault].append(outcome)


def pytest_terminal_summary(terminalreporter):
    if not TALLY:
        return
    write = terminalreporter.write_line
    write("")
    write("| Fault | Runs | Recovered | Iterations computed again | Rows lost |")
    write("|---|---|---|---|---|")
    for fault, runs in TALLY.items():
        recovered, again, rows = (
            sum(run[name] for run in runs) for name in ("recovered", "iterations_lost", "rows_lost")
        )
        write(f"| {fault} | {len(runs)} | {recovered} | {again} | {rows} |")
