"""run_folder.py: a folder that one run writes to at a time, claimed by real processes."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from engine.run_folder import LOCK, claim, release

HOLD = "import sys, time; from engine.run_folder import claim\n"
HOLD += "lock = claim(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed tmp_path/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_writes_there(tmp_path, holder):
    with pytest.raises(
        ValueError, match=rf"Another run is writing to .*out \(process {holder.pid} on .*\): name anoth"
    ):
        claim(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):  # being refused has not changed the lock
        claim(str(tmp_path / "out"))


def test_a_folder_is_free_again_however_its_run_ended(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claim(str(tmp_path / "out")):
        assert (tmp_path / "out" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    claim(str(tmp_path / "out")).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file/out cannot be written to"):
        claim(str(tmp_path / "file" / "out"))


def test_what_is_released_leaves_no_trace(tmp_path):
    release(claim(str(tmp_path / "empty")))
    assert not (tmp_path / "empty").exists()
    lock = claim(str(tmp_path / "out"))
    (tmp_path / "out" / "metrics.jsonl").touch()
    release(lock)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_a_lock_that_goes_while_it_is_waited_for_is_no_claim(tmp_path, monkeypatch):
    """Another run ends, and removes its lock, between the moments at which this one opens and locks it."""
    real, calls = fcntl.flock, []

    def flock(lock, how):
        if not calls:
            (tmp_path / "out" / LOCK).unlink()
        calls.append(how)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim(str(tmp_path / "out")) as lock:
        assert len(calls) == 2 and os.path.samestat(os.fstat(lock.fileno()), (tmp_path / "out" / LOCK).stat())


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(ValueError, match="output_dir is empty"):
        claim(" ")
