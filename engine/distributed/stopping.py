"""Being asked to stop: SIGTERM and SIGUSR1, which schedulers send before they take a machine away, Ctrl-C, and the end
of the launcher, which may have been told in the ranks' place.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from engine.distributed import comm

LAUNCHERS = {"deepspeed", "torchrun", "accelerate"}  # commands
LAUNCHING = ("deepspeed.launcher.", "torch.distributed.")  # modules, after -m
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether any rank has been asked to stop. The run then finishes its step, saves, and ends well."""

    def __init__(self):
        self.asked_by: str | None = None
        self.interrupted = False
        self.launchers: list[psutil.Process] = []
        self.before: dict[int, Any] = {}

    @classmethod
    def listening(cls) -> "StopRequest":
        """One that hears the signals from now on; from the main thread."""
        request = cls()
        request.before = {number: signal.signal(number, request.hear) for number in ASKING}
        request.launchers = [process for process in psutil.Process().parents() if _launches(process)]
        return request

    def close(self) -> None:
        """Leave the signals to whoever heard them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame) -> None:
        """A signal's handler. A second Ctrl-C leaves at once."""
        del frame
        if number == signal.SIGINT and self.interrupted:
            os._exit(130)
        self.interrupted |= number == signal.SIGINT
        self._asked(signal.Signals(number).name)

    def _asked(self, by: str) -> None:
        first, self.asked_by = self.asked_by is None, by
        if first and comm.is_main():
            again = " Ctrl-C again leaves at once." if self.interrupted else ""
            with suppress(OSError):  # who reads it may have been interrupted too
                # Not print(): this may have interrupted one.
                os.write(2, f"\n{by}: the run finishes its step, saves and stops.{again}\n".encode())

    def agreed(self) -> bool:
        """Whether some rank was asked. A collective."""
        if self.asked_by is None and not all(map(_goes_on, self.launchers)):
            self._asked("the end of the launcher")
        return comm.any_true(self.asked_by is not None)


def _launches(process: psutil.Process) -> bool:
    """Whether this is a launcher of ranks, and not a shell in which one was called: that may end before."""
    try:
        words = process.cmdline()[:6]
    except psutil.Error:
        return False
    return any(Path(word).name in LAUNCHERS or word.startswith(LAUNCHING) for word in words)


def _goes_on(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
