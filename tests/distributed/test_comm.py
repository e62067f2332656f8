"""Joining the process group, under the real launcher."""

import os
import subprocess
import sys
from pathlib import Path

import ranks

JOINS = """
import os
from pathlib import Path
import torch
from engine.distributed import comm
comm.init_distributed(timeout_s=40)
sum_of_ranks = comm.sum_over_ranks(torch.full((3,), comm.rank() + 1.0)).tolist()
files = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"))
print(f"rank {comm.rank()}: {sum_of_ranks}, left: {len(files)}", flush=True)
os._exit(0)  # without a word to anybody, as a killed rank
"""


def test_ranks_leave_nothing_in_shared_memory_whichever_way_they_end(tmp_path):
    """The name is gone while they run, so that even killed ones give the memory back."""
    script, port = tmp_path / "joins.py", str(ranks.free_port())
    script.write_text(JOINS)
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_accelerators", "2", "--master_port", port, str(script)]
    given = dict(cwd=tmp_path, env=os.environ | ranks.OFFLINE, capture_output=True, text=True, timeout=120)
    done = subprocess.run(command, check=False, **given)
    for rank in (0, 1):
        assert f"rank {rank}: [3.0, 3.0, 3.0], left: 0" in done.stdout, done.stdout + done.stderr
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
