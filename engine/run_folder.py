"""The folder that a run writes to, claimed for one run at a time."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LOCK = ".lock"


def claim(output_dir: str) -> TextIO:
    """Make the folder and keep other runs out of it.

    Returns:
        The lock, an open file, for `release`. The folder is free again when its process ends, however it ends.

    Raises:
        ValueError: it cannot be written to, or another run is writing to it.
    """
    if not output_dir.strip():
        raise ValueError("output_dir is empty: name the folder to write to.")
    path = Path(output_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+")  # noqa: SIM115 - the caller's
    except OSError as error:
        raise ValueError(f"output_dir={output_dir} cannot be written to: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(f"Another run is writing to {output_dir} ({holder}): name another --output_dir.") from None
    except OSError as error:  # a file system without locks
        print(f"Warning: {output_dir} cannot be locked ({error}): see that no other run writes to it.", flush=True)
    if not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):  # released just now
        lock.close()
        return claim(output_dir)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def release(lock: TextIO) -> None:
    """Let other runs in; a folder to which nothing was written goes."""
    path = Path(lock.name)
    path.unlink(missing_ok=True)
    lock.close()
    with suppress(OSError):  # it holds something
        path.parent.rmdir()
