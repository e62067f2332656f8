"""stopping.py: signals that are heard, in real processes; and by all ranks when one of them is."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from engine.distributed import comm, stopping
from engine.distributed.stopping import StopRequest

WAIT = """
import time
from types import SimpleNamespace
from engine.distributed.stopping import StopRequest
request = StopRequest.listening()
print("listening", flush=True)
while request.asked_by is None:
    time.sleep(0.01)
print("asked by", request.asked_by, flush=True)
time.sleep(60)
"""


@pytest.fixture
def waiting():
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("listening" in line for line in iter(process.stdout.readline, ""))
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_and_does_not_end(waiting, number):
    waiting.send_signal(number)
    assert waiting.stdout.readline() == f"asked by {number.name}\n"
    waiting.send_signal(signal.SIGTERM)  # launchers send one after a Ctrl-C: it is no second Ctrl-C
    time.sleep(0.3)
    assert waiting.poll() is None


def test_a_second_ctrl_c_leaves_at_once(waiting):
    waiting.send_signal(signal.SIGINT)
    assert waiting.stdout.readline() == "asked by SIGINT\n"
    waiting.send_signal(signal.SIGTERM)  # the launcher's
    time.sleep(0.2)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=5) == 130
    said = waiting.stderr.read()
    assert "SIGINT: the run finishes its step, saves and stops. Ctrl-C again leaves at once." in said


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["python", "/env/bin/deepspeed", "launch/train_ppo.py"], True),
        (["/env/bin/python", "-u", "-m", "deepspeed.launcher.launch", "launch/train_ppo.py"], True),
        (["python", "/env/bin/torchrun", "launch/train_ppo.py"], True),
        (["bash", "-c", "cd /deepspeed && nohup deepspeed launch/train_ppo.py &"], False),  # may end, the run goes on
        (["python", "/home/deepspeed/train.py"], False),
        ([], False),
    ],
)
def test_a_launcher_is_told_from_the_shell_that_called_it(words, launches):
    assert stopping._launches(SimpleNamespace(cmdline=lambda: words)) == launches


def asked_on_one_rank():
    with_handler = signal.getsignal(signal.SIGUSR1)
    request = StopRequest.listening()
    before = request.agreed()
    if comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    after = request.agreed()
    request.close()
    return before, after, request.asked_by, signal.getsignal(signal.SIGUSR1) == with_handler


def test_all_ranks_agree_when_one_was_asked(run_ranks):
    assert run_ranks(asked_on_one_rank) == [(False, True, None, True), (False, True, "SIGUSR1", True)]
