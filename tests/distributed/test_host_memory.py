"""host_memory.py: a CPU rank's tensors reuse the memory of those before them, unless the user has tuned glibc."""

import os
import platform
import subprocess
import sys

import pytest
import ranks

from engine.distributed import host_memory

# The first few settle where in its heap glibc puts blocks of this size; torch asks for aligned ones.
PROGRAM = """
import resource
import torch
{before}
def touch():
    torch.empty(2**24).fill_(1.0)
for _ in range(20):
    touch()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start, flush=True)
"""
KEEPS = "from engine.distributed.host_memory import keep_freed_memory; keep_freed_memory()"
JOINS = "from engine.distributed import comm; comm.init_distributed(timeout_s=40)"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")


def faults(before: str, **tuned: str) -> int:
    """Minor page faults of four tensors of 64 MiB, one after another, in a process of their own.

    Args:
        before: what it runs first.
        tuned: variables for glibc, in the place of the caller's own.
    """
    inherited = {name: of for name, of in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    given = dict(env=inherited | ranks.OFFLINE | tuned, cwd=ranks.ROOT, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, check=False, **given)
    said = [line.split() for line in done.stdout.splitlines()]
    found = [int(words[1]) for words in said if words[:1] == ["faults"]]
    assert len(found) == 1, done.stdout + done.stderr
    return found[0]


@pytest.fixture(scope="module")
def untouched() -> int:
    """Negative control: of a process that tells glibc nothing."""
    found = faults("")
    assert found > 1000, "every tensor is faulted in anew"
    return found


@pytest.mark.parametrize("before", [KEEPS, JOINS], ids=["told", "a CPU rank"])
def test_tensors_reuse_the_memory_of_those_before_them(untouched, before):
    assert faults(before) < untouched / 100


@pytest.mark.parametrize(
    "tuned",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}],
    ids=lambda tuned: next(iter(tuned)),
)
def test_what_the_user_has_tuned_stays_so(untouched, tuned):
    assert faults(KEEPS, **tuned) > untouched / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())  # without a mallopt
    host_memory.keep_freed_memory()
