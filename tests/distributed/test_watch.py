"""watch.py and run.py: real ranks of a run, one of which dies, fails, or leaves."""

import re
import signal
import socket
import time

import pytest
from processes import Ranks

from engine.distributed import comm, watch

SCRIPT = """
import sys, time
import tiny
from engine.config import run
from engine.distributed import comm, watch
from engine.distributed.run import Run

def late(connection, lines=watch._lines):
    yield from lines(connection)
    time.sleep(1)

def main():
    if "late" in sys.argv[3]:
        watch._lines = late
    sizes = dict(rollout_batch_size=12, minibatch_size=6, micro_batch_size=1)
    with Run(tiny.ppo_config(sys.argv[1], distributed_timeout_s=600, **sizes)) as this_run:
        this_run.watch.tell("train", 7)
        comm.barrier()
        print("working", flush=True)
        if comm.rank() == int(sys.argv[2]):
            if sys.argv[3] == "raise":
                raise RuntimeError("out of ideas")
            if sys.argv[3] == "mistake":
                raise ValueError("no such row")
            time.sleep(600 if "sleep" in sys.argv[3] else 0)
        if sys.argv[3] == "end":
            time.sleep(comm.rank())  # the ranks do not end at the same moment
        else:
            comm.barrier()  # for ever, as far as this rank knows

run(main)
"""


@pytest.fixture
def ranks_of(tmp_path):
    """`ranks_of(which, what)`: ranks of a run, of which this one does that."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(which: int, what: str, world_size: int = 2) -> Ranks:
        (tmp_path / "data").mkdir()
        given = (str(tmp_path / "data"), str(which), what)
        started.append(Ranks(tmp_path / "logs", str(tmp_path / "script.py"), *given, world_size=world_size))
        started[-1].wait_until(lambda: all("working" in started[-1].said(rank) for rank in range(world_size)))
        return started[-1]

    yield start
    for run in started:
        run.__exit__()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_others(ranks_of, dies):
    """Rank 0 too, which holds the others' connections."""
    run = ranks_of(dies, "sleep")
    run.send(signal.SIGKILL, dies)
    began = time.monotonic()
    codes = run.codes(timeout_s=30)
    assert codes[dies] == -9 and codes[1 - dies] == 1 and time.monotonic() - began < 10
    said = run.said(1 - dies)
    assert f"Rank {dies} of 2 died in phase train of iteration 7. The run ends; --resume auto goes on" in said


def test_a_collective_that_fails_before_the_death_is_heard_of_does_not_hide_it(ranks_of):
    run = ranks_of(1, "sleep, heard of late")
    run.send(signal.SIGKILL, 1)
    assert run.codes(timeout_s=30) == [1, -9]
    assert "Rank 1 of 2 died in phase train of iteration 7." in run.said(0)


def test_of_three_ranks_the_other_two_end(ranks_of):
    run = ranks_of(2, "sleep", world_size=3)
    run.send(signal.SIGKILL, 2)
    assert run.codes(timeout_s=30) == [1, 1, -9]
    assert "Rank 2 of 3 died in phase train of iteration 7." in run.said(0)


def test_a_rank_that_raises_says_so_itself_and_takes_the_others_along(ranks_of):
    run = ranks_of(1, "raise")
    assert run.codes(timeout_s=30) == [1, 1]
    assert "RuntimeError: out of ideas" in run.said(1)
    assert "Rank 1 of 2 failed in phase train of iteration 7: RuntimeError: out of ideas." in run.said(0)


def test_a_mistake_that_one_rank_alone_notices_ends_the_others(ranks_of):
    """A ValueError, which is mostly raised on all ranks."""
    run = ranks_of(1, "mistake")
    assert run.codes(timeout_s=30) == [1, 1]
    assert "ValueError: no such row" in run.said(1)


def test_strangers_are_not_heard(tmp_path, run_ranks):
    assert run_ranks(with_strangers) == [True, True]


def with_strangers():
    """Ranks that connect while others knock: with no token, with a wrong one, and with nothing at all."""
    real = socket.create_connection
    if comm.rank() == 1:

        def knock(address, timeout):
            for said in (b"", b"hello\n", b'{"token": "\xc3\xa9", "rank": 1}\n', b"[" * 5000):
                with real(address, timeout=5) as stranger:
                    stranger.sendall(said)
            return real(address, timeout=timeout)

        watch.socket.create_connection = knock
    try:
        ours = watch.Watch()
    finally:
        watch.socket.create_connection = real
    connected = not ours.closed and len(ours.connections) == 1
    comm.barrier()
    ours.close()
    return connected


def test_a_run_that_ends_is_no_death(ranks_of):
    run = ranks_of(0, "end")
    assert run.codes(timeout_s=60) == [0, 0]
    assert not re.search("died|failed", run.said(0) + run.said(1))
