"""Runs a script to which a fault happens: python with_fault.py RANK:MODULE:FUNCTION:CALL:WHAT script.py flags ...

On rank RANK (or `all`), at the CALL-th call of MODULE's FUNCTION (a method as `Class.method`), WHAT: a signal of this
name is sent to the process itself just before it (`after-SIGKILL`: just after it); `full-disk` raises what a full disk
does; `nan` makes the tensor it returns NaN; `empty` empties the lists it returns.
"""

import errno
import importlib
import os
import runpy
import signal
import sys


def main() -> None:
    fault, script = sys.argv[1], sys.argv[2]
    rank, module, function, call, what = fault.split(":")
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    if rank in ("all", os.environ["RANK"]):
        spoil(module, function, int(call), what)
    runpy.run_path(script, run_name="__main__")


def spoil(module: str, function: str, call: int, what: str) -> None:
    """Let it happen at this call."""
    owner = importlib.import_module(module)
    *path, name = function.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), 0

    def spoiled(*args, **kwargs):
        nonlocal calls
        calls += 1
        now = calls == call
        if now and what == "full-disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if now and what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what])
        result = real(*args, **kwargs)
        if now and what == "nan":
            return result * float("nan")
        if now and what == "empty":
            return type(result)(*([[] for _ in rows] for rows in result))
        if now and what.startswith("after-"):
            os.kill(os.getpid(), signal.Signals[what.removeprefix("after-")])
        return result

    setattr(owner, name, spoiled)


if __name__ == "__main__":
    main()
