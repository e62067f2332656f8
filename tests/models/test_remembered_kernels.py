"""linear_layers.py: oneDNN keeps few of the kernels that it makes for every number of rows."""

import os
import subprocess
import sys

import pytest
import ranks
import tiny
import torch
from large_layers import loaded
from torch import nn

from engine.models.linear_layers import use_fast_products

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch is without oneDNN", allow_module_level=True)

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MANY_ROWS = """
import psutil
import torch
from engine.models.linear_layers import use_fast_products
torch.set_num_threads(1)
{before}
weight = torch.ones(384, 384)
def resident(rows):
    for count in rows:
        torch.ops.mkldnn._linear_pointwise(torch.ones(count, 384), weight, None, "none", [], "")
    return psutil.Process().memory_info().rss
before = resident(range(64, 264))
print("grown", resident(range(264, 464)) - before, flush=True)
"""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TOLD = "use_fast_products(torch.nn.Identity())"


def grown(before: str, **environment: str) -> float:
    """MiB that a process of its own gains from its 201st to its 400th number of rows."""
    free_at_once = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    mine = {name: of for name, of in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", MANY_ROWS.format(before=before)],
        env=mine | ranks.OFFLINE | NO_GPU | free_at_once | environment,
        cwd=ranks.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 2**20


@pytest.fixture(scope="module")
def forgetting_nothing() -> float:
    """Negative control: of a process that tells oneDNN nothing."""
    found = grown("")
    if found < 50:
        pytest.skip("oneDNN keeps little on this processor")
    return found


def test_kernels_of_many_numbers_of_rows_are_let_go_of(forgetting_nothing):
    assert grown(TOLD) < forgetting_nothing / 4


@pytest.mark.parametrize("name", KERNELS)
def test_the_users_own_number_of_kernels_stays(monkeypatch, name):
    for other in KERNELS:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "1000")
    use_fast_products(nn.Identity())
    assert [os.environ.get(other) for other in KERNELS] == ["1000" if other == name else None for other in KERNELS]


def test_a_loaded_model_remembers_few(faster, monkeypatch):
    for name in KERNELS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    loaded(tiny.LLAMA)
    assert [os.environ[name] for name in KERNELS] == ["128", "128"]
