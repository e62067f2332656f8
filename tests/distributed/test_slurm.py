"""Ranks that srun starts: two tasks of a step find each other, and a batch script is not taken for one."""

import os
import subprocess
import sys

import pytest
import ranks

from engine.distributed.slurm import first_host, ranks_of_srun

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu[007-009,12],login1", "gpu007"),
        ("gpu[3,5-7]", "gpu3"),
        ("node1", "node1"),
        ("a-1.cluster,b-2.cluster", "a-1.cluster"),
        ("rack[2-3]n[10-11]", "rack2n10"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodelist, first):
    assert first_host(nodelist) == first


def test_a_task_is_told_who_it_is():
    ranks = ranks_of_srun(STEP)
    assert (ranks["RANK"], ranks["WORLD_SIZE"], ranks["LOCAL_RANK"], ranks["LOCAL_WORLD_SIZE"]) == (
        "17",
        "20",
        "1",
        "4",
    )
    assert ranks["MASTER_ADDR"] == "gpu007"
    assert ranks_of_srun(STEP | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "8"
    others = [
        ranks_of_srun(STEP | other)["MASTER_PORT"] for other in ({"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4712"})
    ]
    assert len({ranks["MASTER_PORT"], *others}) == 3
    assert ranks_of_srun(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}) == ranks | {
        "MASTER_ADDR": "head",
        "MASTER_PORT": "29500",
    }


def test_what_is_no_rank_of_a_step():
    """A batch script; a shell that srun has opened, whatever tasks it asked for; a step of one task."""
    for shell in ({"SLURM_PTY_PORT": "40000"}, {"SLURM_JOB_NAME": "interactive"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert ranks_of_srun(STEP | shell) == {}
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert ranks_of_srun(batch) == {}


PROGRAM = """
import torch
from engine.distributed import comm
comm.init_distributed(timeout_s=60)
total = int(comm.sum_over_ranks(torch.tensor([comm.rank() + 1])))
print(comm.rank(), comm.world_size(), comm.is_first_on_node(), total)
comm.shutdown()
"""


def test_two_tasks_of_a_step_are_two_ranks_of_one_run():
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    plain = {name: value for name, value in (os.environ | ranks.OFFLINE).items() if name not in launched}
    here = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    here |= {"SLURM_NODEID": "0", "MASTER_PORT": str(ranks.free_port())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=plain | STEP | here | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            cwd=ranks.ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [task.communicate(timeout=300)[0].split("\n")[-2] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert said == ["0 2 True 3", "1 2 False 3"]
