"""A script that `srun` starts once for each GPU, without a launcher: who it is, and where the others are."""

import re
from collections.abc import Mapping


def ranks_of_srun(told: Mapping[str, str]) -> dict[str, str]:
    """What `torchrun` would have set, from what a Slurm step sets: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT; the last two are kept where they are set. Empty outside a step, in a step of one task,
    and in a shell that `srun --pty` or `salloc` has opened: a plain `python` there is one rank, as in a batch script.

    Args:
        told: the environment; srun(1), OUTPUT ENVIRONMENT VARIABLES.
    """
    a_shell = "SLURM_PTY_PORT" in told or told.get("SLURM_JOB_NAME") == "interactive"
    if a_shell or int(told.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return {}
    return {
        "RANK": told["SLURM_PROCID"],
        "WORLD_SIZE": told["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": told["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_here(told["SLURM_STEP_TASKS_PER_NODE"], int(told["SLURM_NODEID"])),
        "MASTER_ADDR": told.get("MASTER_ADDR", first_host(told["SLURM_STEP_NODELIST"])),
        # Two jobs on one node, and two steps of a job, have ports of their own.
        "MASTER_PORT": told.get("MASTER_PORT", str(20_000 + (16 * int(told["SLURM_JOB_ID"]) + _step(told)) % 20_000)),
    }


def first_host(nodelist: str) -> str:
    """The first host of a compressed list: `gpu[007-009,12],login1` -> `gpu007`."""
    host = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodelist).group()
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host)


def _tasks_here(tasks_per_node: str, node: int) -> str:
    """Of `8(x2),4`: 8, 8 and 4."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        node -= int(times or 1)
        if node < 0:
            return count
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node} says nothing of node {node}.")


def _step(told: Mapping[str, str]) -> int:
    return int(told.get("SLURM_STEP_ID", 0)) % 16
