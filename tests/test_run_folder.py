"""run_folder.py: a folder that one run writes to at a time, claimed by real processes."""

import os
import signal
import subprocess
import sys

import pytest

from engine.run_folder import LOCK, claim

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


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(ValueError, match="output_dir is empty"):
        claim(" ")
