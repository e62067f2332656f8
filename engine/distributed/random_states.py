"""The random number generators of a rank, in words that JSON has."""

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from engine.distributed import comm


def random_states() -> dict[str, Any]:
    """Of this rank's generators. The noise of responses is not among them: it is keyed by iteration and prompt."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002 - what users' code draws from
    torches = [torch.get_rng_state()]
    if comm.device().type == "cuda":
        torches.append(torch.cuda.get_rng_state())
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": [base64.b64encode(state.numpy().tobytes()).decode() for state in torches],
    }


def set_random_states(everyones: list[dict[str, Any]]) -> None:
    """Those of this rank; a rank that there was not goes on with its own."""
    if comm.rank() >= len(everyones):
        return
    _set(everyones[comm.rank()])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Whatever is drawn in the block, this rank's generators are as they were when it ends."""
    before = random_states()
    try:
        yield
    finally:
        _set(before)


def _set(mine: dict[str, Any]) -> None:
    version, numbers, gauss = mine["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = mine["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002 - as above
    states = [torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in mine["torch"]]
    torch.set_rng_state(states[0])
    if comm.device().type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1])
