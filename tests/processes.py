"""Ranks as real processes of a script, which faults can be done to. No launcher: it would end the others first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ranks

WITH_FAULT = Path(__file__).resolve().parent / "faults" / "with_fault.py"


class Ranks:
    """The processes of one run."""

    def __init__(self, folder: Path, script: str, *flags: str, world_size: int = 2, fault: str | None = None):
        """
        Args:
            folder: what the ranks print goes to.
            script: of launch/, or a path.
            fault: what happens to the run; see `with_fault.py`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
        port = str(ranks.free_port())
        command = [sys.executable, *(() if fault is None else (str(WITH_FAULT), fault)), script, *flags]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            place |= dict(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            given = {**os.environ, **ranks.OFFLINE, "PYTHONUNBUFFERED": "1", **place}
            with open(log, "w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ranks.ROOT, env=given, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def wait_until(self, condition, *, timeout_s: float = 120) -> None:
        """
        Raises:
            AssertionError: it has not come true, or all ranks have ended before.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = all(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise AssertionError("\n".join(self.said(rank)[-3000:] for rank in range(len(self.logs))))
            time.sleep(0.02)

    def send(self, number: signal.Signals, rank: int) -> None:
        self.processes[rank].send_signal(number)

    def codes(self, *, timeout_s: float = 120) -> list[int]:
        """The exit codes, once all have ended."""
        deadline = time.monotonic() + timeout_s
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.processes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
