"""The run that faults are done to, and what became of it each time."""

import ppo_runs
import pytest


@pytest.fixture
def tally(record_property):
    """`tally(fault, recovered=..., iterations_lost=..., rows_lost=...)`: one run, for the table at the end."""
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
