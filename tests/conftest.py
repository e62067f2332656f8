"""Fixtures: real ranks (`run_ranks`), a small PPO config (`ppo_config`), strict ZeRO-3, names of tiny models.

What ranks need too lives in `tiny.py` (models, configs) and `ranks.py` (the processes), importable from every test.
"""

import os
import shutil
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
for folder in (str(TESTS), str(TESTS.parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from engine import startup  # noqa: E402, I001 - first of what needs the path above

import ranks  # noqa: E402
import tiny  # noqa: E402

os.environ.update({name: value for name, value in ranks.OFFLINE.items() if name != "PYTHONPATH"})


def pytest_collection_finish():
    startup.imported()


def pytest_terminal_summary(terminalreporter):
    """What became of the runs that faults were done to. Here, since pytest-xdist reads no conftest of folders below."""
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


@pytest.fixture(scope="session", autouse=True)
def _own_data_cache(tmp_path_factory):
    """Token ids of this session alone, for the ranks it starts too: none are left of other code, none are left behind.
    DeepSpeed's operator and the random:// models take long to make and are shared with every other session.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_ENGINE_DATA_CACHE", str(tmp_path_factory.mktemp("data_cache")))
        yield


@pytest.fixture(scope="session")
def _pools(_own_data_cache):
    pools = ranks.Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def run_ranks(_pools):
    """`run_ranks(function, *args, world_size=2, timeout_s=120)` -> the results by rank.

    `function` is module-level, its arguments and results can be pickled. It runs with the process group initialised.
    """
    return _pools.run_ranks


@pytest.fixture
def ppo_config(tmp_path):
    """`ppo_config(**overrides)` -> PPOConfig; see `tiny.ppo_config`."""
    return partial(tiny.ppo_config, tmp_path)


@pytest.fixture
def strict_z3(tmp_path) -> str:
    """A DeepSpeed file of ZeRO-3 with every default that would hide it on a tiny model switched off."""
    return tiny.strict_z3_file(tmp_path)


@pytest.fixture(params=list(tiny.MODELS))
def model_name(request) -> str:
    """Each of the tiny language models in turn."""
    return tiny.MODELS[request.param]


@pytest.fixture(scope="session")
def gpt2_without_pad(tmp_path_factory) -> str:
    """A folder with the tiny GPT-2 whose tokenizer, like the real one's, has no pad token."""
    from transformers import AutoTokenizer

    from engine.models.random_init import local_name

    folder = tmp_path_factory.mktemp("models") / "gpt2_without_pad"
    shutil.copytree(local_name(tiny.GPT2), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)
