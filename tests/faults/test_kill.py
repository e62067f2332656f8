"""A rank is killed: the others end at once and say so, and what is gone on with is the run that was never killed.

By default five points are tried; RLHF_ENGINE_FAULTS=all tries twenty (`bash tests/faults/run.sh`).
"""

import os
import random
import re
import time

import ppo_runs
import pytest

# Phase -> functions, by the names that their callers use, and how often a rank calls them in a run. Some of the last
# only rank 0 calls.
WHERE = {
    "generate": [
        ("engine.rollout.sampler:sampled_responses", 4),
        ("engine.trainers.ppo_trainer:sequences_of_all_ranks", 4),
    ],
    "score": [("engine.trainers.ppo_trainer:measure", 4), ("engine.trainers.ppo_trainer:shaped_experience", 4)],
    "train": [
        ("engine.trainers.ppo_update:accumulate", 24),
        ("engine.trainers.ppo_update:step_together", 12),
        ("engine.distributed.moving_average:MovingAverage.update", 12),
    ],
    "save": [("engine.distributed.checkpoint:save_file", 4), ("engine.distributed.checkpoint:flush", 8)],
    "save, on rank 0": [
        ("engine.distributed.checkpoint:_write_manifest", 4),
        ("engine.distributed.checkpoint:put_in_place", 4),
        ("engine.distributed.checkpoint:remove_others", 4),
        ("engine.tracking.tracker:Tracker._write", 8),
    ],
}


def points(count: int) -> list[str]:
    """Faults, the phases in turn."""
    rng, chosen = random.Random(5), []
    for number in range(count):
        phase = list(WHERE)[number % len(WHERE)]
        function, calls = rng.choice(WHERE[phase])
        rank = 0 if "rank 0" in phase else rng.randrange(2)
        chosen.append(f"{rank}:{function}:{rng.randint(1, calls)}:{rng.choice(('', 'after-'))}SIGKILL")
    return chosen


POINTS = points(20 if os.environ.get("RLHF_ENGINE_FAULTS") == "all" else 5)


@pytest.mark.parametrize("fault", POINTS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe, whole, tmp_path, tally, fault):
    out, killed = tmp_path / "out", int(fault[0])
    with ppo_runs.start(recipe, out, fault=fault) as run:
        run.wait_until(lambda: run.processes[killed].poll() is not None)
        died = time.monotonic()
        codes = run.codes(timeout_s=30)
        took = time.monotonic() - died
        said = run.said(1 - killed)
    assert codes[killed] == -9 and codes[1 - killed] == 1, said
    assert took < 30
    assert re.search(rf"Rank {killed} of 2 died in phase (generate|score|train|save) of iteration [1-4]\.", said), said
    ppo_runs.recovered(recipe, out, whole, lambda **found: tally("SIGKILL of a rank", **found))
