"""Real ranks for tests: `run_ranks(function, *args)` runs a module-level function on N gloo processes.

A process takes seconds to import everything, so each pool of ranks lives for the whole session. A rank that raises or
times out takes its pool with it: the next use starts a fresh one. This file is also what the processes run.
"""

import contextlib
import gc
import importlib.util
import inspect
import multiprocessing.connection as connections
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OFFLINE = dict(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_MODE="offline",
    # Which ninja compiles DeepSpeed's op is decided by PATH; two versions of it rebuild each other's work for minutes.
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
)
START_S = 300  # imports, and on a fresh machine the compilation of DeepSpeed's op
GRACE_S = 4  # for the other ranks to say what happened to them, once one has failed


class RankFailed(AssertionError):  # noqa: N818 - a failed assertion of a test, told by its rank
    """A rank raised, died or did not answer in time; the message shows what it said."""


# Below those that the kernel gives out: by the time that a run listens on one, another would have it now and then.
PORTS = iter(random.Random().sample(range(15_000, 32_000), 17_000))


def free_port() -> int:
    """One that nothing listens on."""
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Pool:
    """Processes that share one process group and wait for functions to run."""

    def __init__(self, world_size: int, *, group_timeout_s: int = 40):
        self.world_size = world_size
        port = free_port()
        self.processes: list[subprocess.Popen] = []
        self.pipes: list[Connection] = []
        self.logs = []
        for rank in range(world_size):
            ours, theirs = connections.Pipe()
            log = tempfile.NamedTemporaryFile(prefix=f"rank{rank}_", suffix=".log")  # noqa: SIM115 - closed by kill
            ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
            there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            environment = {**os.environ, **OFFLINE, **{name: str(value) for name, value in ranks.items()}, **there}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(TESTS / "ranks.py"), str(theirs.fileno()), str(group_timeout_s)],
                    env=environment,
                    cwd=ROOT,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
            theirs.close()
            self.pipes.append(ours)
            self.logs.append(log)
        self._answers("starting", START_S)

    def run(self, function: Callable, args: tuple, timeout_s: float) -> list[Any]:
        """The function's results, by rank."""
        order = pickle.dumps((inspect.getfile(function), function.__module__, function.__qualname__, args))
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # a rank that is gone is noticed when it does not answer
                pipe.send_bytes(order)
        return self._answers(function.__qualname__, timeout_s)

    def _answers(self, what: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        said: dict[int, str] = {}
        results: dict[int, Any] = {}
        while len(results) + len(said) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results and rank not in said]
            ready = connections.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    worked, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    worked, answer = False, f"died with exit code {self.processes[rank].wait()}"
                if worked:
                    results[rank] = answer
                else:
                    said[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if not ready:
                break
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        for rank in set(range(self.world_size)) - results.keys() - said.keys():
            said[rank] = "did not answer" + ("" if said else f" within {timeout_s} s")
        report = "\n".join(f"--- rank {rank}: {text}\n{self._tail(rank)}" for rank, text in sorted(said.items()))
        self.kill()
        raise RankFailed(f"{what} failed on rank {sorted(said)} of {self.world_size}\n{report}")

    def _tail(self, rank: int) -> str:
        printed = Path(self.logs[rank].name).read_text(errors="replace")[-2000:].strip()
        return f"    it printed last:\n{printed}" if printed else ""

    def kill(self) -> None:
        """End the processes that this pool started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe, log in zip(self.pipes, self.logs, strict=True):
            pipe.close()
            log.close()
        self.processes = []

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.poll() is None for process in self.processes)


class Pools:
    """The session's pools, one per world size, each started on first use."""

    def __init__(self):
        self.of: dict[int, Pool] = {}

    def run_ranks(self, function: Callable, *args: Any, world_size: int = 2, timeout_s: float = 120) -> list[Any]:
        """Results of `function(*args)` by rank; the traceback of a rank that fails is the test's failure."""
        if world_size not in self.of or not self.of[world_size].alive:
            self.of[world_size] = Pool(world_size)
        return self.of[world_size].run(function, args, timeout_s)

    def close(self) -> None:
        for pool in self.of.values():
            pool.kill()


def _found(path: str, module_name: str, qualname: str) -> Callable:
    if module_name not in sys.modules:
        sys.path.insert(0, str(Path(path).parent))
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found = sys.modules[module_name]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _serve(pipe: Connection, group_timeout_s: int) -> None:
    from engine import startup  # noqa: I001 - first

    import torch

    import engine.trainers.ppo_trainer  # noqa: F401 - all that most functions import
    from engine.distributed import comm

    startup.imported()
    torch.set_num_threads(1)
    comm.init_distributed(timeout_s=group_timeout_s)
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            *where, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the session is over
            os._exit(0)
        try:
            answer = True, _found(*where)(*args)
            message = pickle.dumps(answer)
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        gc.collect()
        sys.stdout.flush()
        pipe.send_bytes(message)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
