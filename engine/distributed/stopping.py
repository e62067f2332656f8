"""Being asked to stop: SIGTERM and SIGUSR1, which schedulers send before they take a machine away, and Ctrl-C."""

import os
import signal
from contextlib import suppress
from typing import Any

from engine.distributed import comm

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether any rank has been asked to stop. The run then finishes its step, saves, and ends well."""

    def __init__(self):
        self.asked_by: str | None = None
        self.interrupted = False
        self.before: dict[int, Any] = {}

    @classmethod
    def listening(cls) -> "StopRequest":
        """One that hears the signals from now on; from the main thread."""
        request = cls()
        request.before = {number: signal.signal(number, request.hear) for number in ASKING}
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
        first, self.asked_by = self.asked_by is None, signal.Signals(number).name
        if first and comm.is_main():
            again = " Ctrl-C again leaves at once." if self.interrupted else ""
            said = f"\n{self.asked_by}: the run finishes its step, saves and stops.{again}\n"
            with suppress(OSError):  # who reads it may have been interrupted too
                os.write(2, said.encode())  # not print(): this may have interrupted one

    def agreed(self) -> bool:
        """Whether some rank was asked. A collective."""
        return comm.any_true(self.asked_by is not None)
