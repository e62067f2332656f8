"""One rank of a trial: joins the others, adds one number up with them, and ends. `engine.doctor` starts several.

RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29600 python -m engine.distributed.ping gloo 30
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    backend, timeout_s = sys.argv[1], int(sys.argv[2])
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{os.environ['LOCAL_RANK']}")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    if total.item() != dist.get_world_size():
        sys.exit(f"{dist.get_world_size()} ranks added 1 each, and the sum is {total.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
