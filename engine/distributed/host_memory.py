"""How the C library of a CPU rank deals with memory that tensors leave.

glibc hands large blocks back to the system as soon as they are freed, and every page of the next tensor is faulted in
anew: a fifth of a training step on a CPU.
"""

import ctypes
import os

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
KEPT_BYTES_BEFORE_2_35 = 2**25  # the most that older versions of glibc take


def keep_freed_memory() -> None:
    """Let this process keep the blocks up to 1 GiB that it frees for its next tensors. Its memory stays at its peak,
    which is no higher in the benchmark; where nearly all of it is a few blocks of one size, the gaps between them can
    double it. Does nothing where the user has tuned glibc already (`MALLOC_...`, `GLIBC_TUNABLES`), and nothing to
    another allocator or C library.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or tuned:
        return
    if mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, KEPT_BYTES_BEFORE_2_35):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
