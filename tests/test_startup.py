"""startup.py: what is imported is not looked through for garbage, and what comes after it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

SCRIPTS = sorted((ranks.ROOT / "launch").glob("*.py"))
WATCHED = """
import gc

import engine.startup

looked_through = []
gc.callbacks.append(lambda phase, info: looked_through.append(info["generation"]) if phase == "start" else None)

from engine.config import run
from engine.models.loading import load_tokenizer

def main():
    assert not looked_through, "while all was imported"
    assert gc.get_freeze_count() > 100_000
    kept = [[] for _ in range(100_000)]
    assert len(gc.get_objects()) < 2 * len(kept), "what was imported is out of its sight"
    assert looked_through, "what a run makes is not"

run(main)
"""


def test_a_program_of_ones_own_keeps_its_collector_as_it_is():
    program = (
        "import gc; usual = gc.get_threshold(); from engine.config import PPOConfig; assert gc.get_threshold() == usual"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ranks.ROOT, check=True)


def test_garbage_is_looked_for_once_all_is_imported():
    subprocess.run([sys.executable, "-c", WATCHED], cwd=ranks.ROOT, check=True)


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if "run(main)" in path.read_text()], ids=lambda path: path.name
)
def test_a_script_begins_with_it(path: Path):
    imported = [
        line for line in path.read_text().splitlines() if re.match(r"(import|from) (engine|launch|torch)\b", line)
    ]
    assert imported[0].startswith("import engine.startup ")
