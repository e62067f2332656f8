"""Checks of the machine itself: accelerators, shared memory, limits."""

import resource
import shutil
from pathlib import Path

from engine.doctor.findings import Finding, failed, ok, warning
from engine.doctor.subject import Subject

DRIVER = Path("/proc/driver/nvidia/version")
SHARED = Path("/dev/shm")
BUFFER_MIB = 66  # of each rank on a CPU; DeepSpeed 0.19 keeps it there for sums between the ranks of one machine
NCCL_MIB = 1024  # NVIDIA's advice for containers
OPEN_FILES = 1024


def accelerators(subject: Subject) -> Finding:
    """GPUs that torch can use, as many as asked for."""
    import torch

    if not torch.cuda.is_available():
        if not DRIVER.is_file():
            return ok(f"no GPU; {subject.ranks_here} ranks on the CPU")
        driver = DRIVER.read_text().splitlines()[0]
        if torch.version.cuda is None:
            return failed(
                f"this machine has a GPU ({driver}), and torch {torch.__version__} is built without CUDA.",
                "Install a build with CUDA: https://pytorch.org/get-started/locally",
            )
        try:
            torch.cuda.init()
            said = "no device is visible: see CUDA_VISIBLE_DEVICES"
        except Exception as error:  # says whether the driver is too old
            said = str(error)
        return failed(
            f"torch is built for CUDA {torch.version.cuda} and cannot use the GPU ({driver}): {said}.",
            "Update the driver, or install a torch that is built for an older CUDA.",
        )
    names = [torch.cuda.get_device_name(number) for number in range(subject.gpus)]
    if len(names) < subject.ranks_here:
        return failed(
            f"{subject.ranks_here} ranks on a machine with {len(names)} GPUs ({', '.join(names)}).",
            f"Set --num_accelerators {len(names)}.",
        )
    return ok(f"{', '.join(names)}; torch is built for CUDA {torch.version.cuda}")


def shared_memory(subject: Subject) -> Finding:
    """Ranks of one machine exchange numbers through it; containers are often given 64 MiB."""
    space = shutil.disk_usage(SHARED)
    free, total = space.free / 2**20, space.total / 2**20
    remedy = f"Start the container with --shm-size 2g, or remove what is left in {SHARED}."
    if subject.gpus:
        if total < NCCL_MIB:
            return warning(f"{SHARED} has {total:.0f} MiB, NCCL may want {NCCL_MIB}.", remedy)
    elif free < BUFFER_MIB * subject.ranks_here:
        wanted = f"{subject.ranks_here} ranks want {BUFFER_MIB} MiB each"
        return failed(f"{SHARED} has {free:.0f} MiB free, and {wanted}.", remedy)
    return ok(f"{free:.0f} of {total:.0f} MiB free in {SHARED}")


def limits(subject: Subject) -> Finding:
    """What the shell allows its processes."""
    told = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files not in (resource.RLIM_INFINITY,) and files < OPEN_FILES:
        told.append(f"{files} open files (ulimit -n {OPEN_FILES})")
    for name, what, flag in (
        (resource.RLIMIT_AS, "bytes of address space", "-v"),
        (resource.RLIMIT_FSIZE, "bytes in a file", "-f"),
        (resource.RLIMIT_DATA, "bytes of data", "-d"),
    ):
        soft, _ = resource.getrlimit(name)
        if soft != resource.RLIM_INFINITY:
            told.append(f"{soft} {what} (ulimit {flag} unlimited)")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        told.append(f"{locked} bytes of locked memory, which InfiniBand wants more of (ulimit -l unlimited)")
    if told:
        return warning(
            f"a process may have no more than {'; '.join(told)}.", "Raise it in the shell that starts the run."
        )
    return ok(f"{files} open files" if files != resource.RLIM_INFINITY else "none")


CHECKS = [accelerators, shared_memory, limits]
