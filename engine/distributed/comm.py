"""The process group: how ranks start, what they tell each other, and how they agree on an error.

What asks or tells the other ranks is a collective: all ranks call it, in the same order.
"""

import fcntl
import os
import resource
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from torch import Tensor

from engine.distributed.builds import BUILD_QUEUE, FINISHED, LOCK, folder_of_builds
from engine.distributed.host_memory import keep_freed_memory
from engine.distributed.slurm import ranks_of_srun

# DeepSpeed 0.19's own calls, which torch 2.13 wants renamed: nothing a user of this engine could act on.
warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)


def init_distributed(*, timeout_s: int = 1800) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. A script that `srun` starts is one rank of its
    step; one without a launcher is the only rank.

    Args:
        timeout_s: a rank that waits longer than this for the others gives up with an error.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ |= ranks_of_srun(os.environ)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if get_accelerator().device_name() == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
            torch.set_num_threads(max(1, cores // ranks_on_node()))
        _build_ops()
    else:
        seen, place = get_accelerator().device_count(), int(os.environ["LOCAL_RANK"])
        if place >= seen:
            raise ValueError(
                f"Rank {place} of this node sees {seen} GPUs: start as many ranks as there are GPUs, under Slurm with "
                f"--gpus-per-node, not --gpus-per-task or --gpu-bind."
            )
        get_accelerator().set_device(place)
    deepspeed.init_distributed(
        dist_backend="gloo" if get_accelerator().device_name() == "cpu" else "nccl",
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
    if get_accelerator().device_name() == "cpu":
        dist.barrier()  # every rank has the others' buffers in its memory now
        _shared_buffer().unlink(missing_ok=True)


def _shared_buffer() -> Path:
    """Where DeepSpeed 0.19 keeps this rank's 66 MiB for sums between ranks of one machine. It never removes the file,
    which takes up memory until the machine is restarted; without a name the memory goes when the ranks have ended.
    """
    run = "_".join(str(part) for part in (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
    return Path("/dev/shm") / f"deepspeed_allreduce_buffer_{run}_{os.environ['RANK']}"


def shutdown() -> None:
    """Leave the process group, once every rank is done."""
    dist.barrier()
    leave()


def leave() -> None:
    """Leave the process group, whatever the others do. A process that ends without, soon after it has joined, is often
    aborted: gloo's threads are still at work.
    """
    dist.destroy_process_group()


def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on."""
    return {name: version(name) for name in ("torch", "deepspeed", "transformers")}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is global rank 0, the one that writes."""
    return rank() == 0


def is_first_on_node() -> bool:
    """Whether this is the rank that writes what a node keeps for itself."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def ranks_on_node() -> int:
    """How many ranks this one's machine has, as torchrun or DeepSpeed's launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", 1))))


def device() -> torch.device:
    """Where this rank's models and tensors live."""
    return torch.device(get_accelerator().current_device_name())


def device_name() -> str:
    """As "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"


def peak_memory_gib() -> float:
    """This rank's largest memory use so far: of the GPU, or of the process (resident) on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def free_memory() -> int:
    """Bytes that this rank may take: of its GPU, where what torch's allocator holds idle is as good as free; of the
    machine's memory its share on a CPU.
    """
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_host_memory() // ranks_on_node()


def free_host_memory() -> int:
    """Bytes of this rank's machine, for all its ranks."""
    return psutil.virtual_memory().available


def barrier() -> None:
    dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum over ranks, on every rank. NaN anywhere is NaN everywhere."""
    total = tensor.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def max_over_ranks(value: float) -> float:
    """The largest of the ranks' numbers, on every rank. NaN counts as infinity, so that it is never lost."""
    largest = torch.tensor([value], dtype=torch.float64, device=device()).nan_to_num(nan=torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def all_true(verdict: bool) -> bool:
    """Whether every rank says yes."""
    return max_over_ranks(0.0 if verdict else 1.0) == 0.0


def any_true(verdict: bool) -> bool:
    """Whether some rank says yes."""
    return max_over_ranks(1.0 if verdict else 0.0) == 1.0


def concatenated(tensor: Tensor) -> Tensor:
    """The ranks' tensors, of any lengths, one after another along the first dimension, on every rank.

    Args:
        tensor: (n, ...) with this rank's own n; the other dimensions and the dtype are the same everywhere.
    """
    length = torch.tensor([len(tensor)], device=device())
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    padded = torch.zeros(max(int(n) for n in lengths), *tensor.shape[1:], dtype=tensor.dtype, device=device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def of_main(value: Any) -> Any:
    """Rank 0's Python object, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered_objects(value: Any) -> list[Any]:
    """Every rank's Python object, in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Code of the user's that may fail on one rank only: if it does, every rank raises the same ValueError.

    Without this the other ranks would wait in the next collective until the timeout.
    """
    error = None
    try:
        yield
    except Exception as caught:  # reported on every rank below
        error = caught
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    messages = gathered_objects(None if error is None else f"{kind}{error}")
    failed = {number: message for number, message in enumerate(messages) if message is not None}
    if failed:
        first, message = next(iter(failed.items()))
        where = "" if set(messages) == {message} else f"on rank {first} of {world_size()}: "  # all say the same
        raise ValueError(f"{where}{message}") from error


def check_same_everywhere(values: dict[str, Any]) -> None:
    """Refuse a run whose ranks were started with different settings or versions.

    Raises:
        ValueError: names the setting and both values, on every rank.
    """
    for number, theirs in enumerate(gathered_objects(values)):
        for name, mine in values.items():
            if theirs[name] != mine:
                raise ValueError(
                    f"Ranks disagree on {name}: rank {rank()} has {mine!r}, rank {number} has {theirs[name]!r}. "
                    f"Start every rank with the same configuration and the same installation."
                )


def _build_ops() -> None:
    """Compile DeepSpeed's shared-memory op once, before any rank needs it, and load it from then on.

    DeepSpeed 0.19 compiles it inside `init_distributed` on every rank at once; torch guards the build with a file
    named `lock` that a killed build leaves behind, after which every later start waits for it for ever and in
    silence. Here the builds queue up behind an flock, which the kernel releases when its holder dies: whoever holds
    the flock knows that a `lock` file it finds is stale. A finished build is put straight into DeepSpeed's table of
    loaded ops (`OpBuilder._loaded_ops`): its own loader would compile again for every other virtual environment.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = folder_of_builds(torch.__version__, deepspeed.__version__)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    library, finished = folder / builder.name / f"{builder.name}.so", folder / builder.name / FINISHED
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(folder / BUILD_QUEUE, "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        if not (finished.exists() and library.exists()):
            stale = library.with_name(LOCK)
            if stale.exists():
                print(f"An interrupted build left {stale} behind: removing it, building again.", flush=True)
                stale.unlink()
            print(f"Building DeepSpeed's {builder.name} in {folder}, once; this takes up to three minutes.", flush=True)
            builder.load(verbose=False)
            finished.touch()
            return
    spec = spec_from_file_location(builder.name, library)
    op = module_from_spec(spec)
    spec.loader.exec_module(op)
    OpBuilder._loaded_ops[builder.name] = op
