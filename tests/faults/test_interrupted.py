"""What becomes of runs that are asked to stop, lose their disk, their logger or a checkpoint, or have NaN or nothing at
all on one rank.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ppo_runs
import pytest
import ranks
from processes import Ranks


@pytest.mark.parametrize(
    ("fault", "in_flight"),
    [
        ("1:engine.rollout.sampler:sampled_responses:2:SIGTERM", True),  # asked while it generates
        ("0:engine.trainers.ppo_update:step_together:3:SIGUSR1", True),  # ... in the middle of an iteration's steps
        ("all:engine.trainers.ppo_trainer:Checkpoints.after:2:SIGTERM", False),  # ... between two iterations
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_ends_well(recipe, whole, tmp_path, tally, fault, in_flight):
    out, name = tmp_path / "out", fault.rpartition(":")[2]
    with ppo_runs.start(recipe, out, "--checkpoint.every", "100", fault=fault) as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
        said = run.said(0)
    assert "as asked: go on with --resume auto." in said
    if not fault.startswith("1"):
        assert f"{name}: the run finishes its step, saves and stops." in said
    assert not (out / "actor").exists(), "it has not come to its end"
    (folder,) = (out / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text())["state"]
    assert (state["kl_coef_in_flight"] is not None) == in_flight
    ppo_runs.recovered(recipe, out, whole, lambda **found: tally(f"{name}", **found))


@pytest.mark.parametrize("told", ["everybody, by Ctrl-C", "the launcher alone, by SIGUSR1"])
def test_a_launched_run_saves_whoever_is_told(recipe, tmp_path, told):
    """Ctrl-C goes to the launcher and to the ranks; the launcher then sends them SIGTERM, one after another. Another
    signal ends the launcher and nobody else: the ranks notice that it is gone.
    """
    out, launcher = tmp_path / "out", Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", "2", "--master_port", str(ranks.free_port()), "launch/train_ppo.py"]
    command += ["--config", str(recipe), "--output_dir", str(out), "--num_iterations", "400"]
    log = tmp_path / "log"
    with open(log, "w") as printed:
        process = subprocess.Popen(
            command,
            cwd=ranks.ROOT,
            env={**os.environ, **ranks.OFFLINE},
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
    try:
        Ranks.wait_until(_Watched(process, log), lambda: len(ppo_runs.metrics(out)) >= 2)
        if "everybody" in told:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGUSR1)
        process.wait(timeout=60)
        deadline = time.monotonic() + 60  # the ranks may outlive the launcher
        stopped = r"Stopped in iteration \d+ as asked: go on with --resume auto\."
        while not re.search(stopped, log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert re.search(stopped, log.read_text()), log.read_text()[-3000:]
    (folder,) = (out / "checkpoints").iterdir()
    stopped = int(folder.name.removeprefix("iteration_"))
    said = ppo_runs.finish(recipe, out, "--resume", "auto", "--num_iterations", str(stopped + 1))
    assert f"Going on from {folder}." in said and len(ppo_runs.metrics(out)) == stopped + 1


class _Watched:
    """What `Ranks.wait_until` looks at, of one process."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.processes, self.logs = [process], [log]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")


def test_a_truncated_checkpoint_is_passed_over(recipe, whole, tmp_path, tally):
    out = tmp_path / "out"
    with ppo_runs.start(recipe, out, fault="1:engine.trainers.ppo_trainer:measure:4:SIGKILL") as run:
        run.codes(timeout_s=90)
    newest = out / "checkpoints" / "iteration_000003" / "pieces_00001.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    said = ppo_runs.recovered(recipe, out, whole, lambda **found: tally("a truncated checkpoint", **found))
    assert re.search(
        r"iteration_000003 is damaged \(pieces_00001\.safetensors has \d+ bytes of \d+\): passed over", said
    )
    assert "iteration_000002." in said


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_does_not_end_a_run(recipe, whole, tmp_path, small_disk, tally):
    """There is room for one checkpoint and not for a second; in the end not for the models either."""
    out = small_disk / "out"
    out.mkdir()
    with ppo_runs.start(recipe, out) as run:
        run.wait_until(lambda: len(list((out / "checkpoints").glob("iteration_*1"))) == 1)
        (small_disk / "filling").write_bytes(b"0" * (_free(small_disk) - 20_000))
        codes, said = run.codes(), run.said(0)
    assert codes == [1, 1], "the models could not be exported"
    assert said.count("WARNING: NO CHECKPOINT WAS WRITTEN at iteration") >= 2
    assert "No space left on device" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["iteration_000001"]
    assert len(ppo_runs.metrics(out)) == ppo_runs.NUM_ITERATIONS, "it went on to the end"
    (small_disk / "filling").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ppo_runs.recovered(recipe, out, whole, lambda **found: tally("a full disk", **found))


def _free(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def test_a_dead_logger_does_not_end_a_run(recipe, whole, tmp_path, tally):
    """W&B raises in the middle of the run."""
    out = tmp_path / "out"
    fault = "0:wandb.sdk.wandb_run:Run.log:2:full-disk"
    with ppo_runs.start(recipe, out, "--tracking.wandb", "offline", fault=fault) as run:
        codes, said = run.codes(), run.said(0)
    assert codes == [0, 0] and "W&B failed (OSError: [Errno 28]" in said
    same = ppo_runs.outcome(out) == whole
    tally("a dead logger", recovered=same, iterations_lost=0, rows_lost=0)
    assert same


@pytest.mark.parametrize("where", ["clipped_value_loss", "PolicyObjective.loss"])
def test_nan_on_one_rank_skips_one_step_on_all(recipe, whole, tmp_path, tally, where):
    """The loss of one micro-batch on rank 1, in the first step of the second iteration."""
    out = tmp_path / "out"
    with ppo_runs.start(recipe, out, fault=f"1:engine.trainers.ppo_update:{where}:5:nan") as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
        said = run.said(0)
    assert "iteration 2: step skipped on all ranks, a loss or a gradient that is not finite" in said
    metrics = ppo_runs.metrics(out)
    assert [line["skipped/steps"] for line in metrics] == [0, 1, 1, 1]
    assert all(value is not None for line in metrics for value in line.values()), "null would be NaN"
    assert metrics[0] == whole["metrics"][0] and metrics[3] != whole["metrics"][3]
    kept = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and {row["iteration"] for row in kept} == {2}, "the one minibatch of a short iteration"
    lost = len(whole["samples"].splitlines()) - len((out / "samples.jsonl").read_text().splitlines())
    tally("NaN on one rank", recovered=(out / "actor").exists(), iterations_lost=0, rows_lost=lost)


def test_empty_responses_of_one_rank_do_not_end_a_run(recipe, whole, tmp_path, tally):
    out = tmp_path / "out"
    with ppo_runs.start(recipe, out, fault="1:engine.rollout.sampler:sampled_responses:2:empty") as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
    metrics = ppo_runs.metrics(out)
    assert all(value is not None for line in metrics for value in line.values()), "null would be NaN"
    assert [line["skipped/steps"] for line in metrics] == [0] * ppo_runs.NUM_ITERATIONS
    lengths = [line["response/length_mean"] for line in metrics]
    assert metrics[0] == whole["metrics"][0] and lengths[1] < whole["metrics"][1]["response/length_mean"]
    lost = len(whole["samples"].splitlines()) - len((out / "samples.jsonl").read_text().splitlines())
    tally("empty responses of one rank", recovered=(out / "actor").exists(), iterations_lost=0, rows_lost=lost)


def test_a_second_run_into_the_same_folder_is_refused(recipe, tmp_path):
    out = tmp_path / "out"
    with ppo_runs.start(recipe, out, "--num_iterations", "400") as run:
        run.wait_until(lambda: len(ppo_runs.metrics(out)) >= 1)
        with ppo_runs.start(recipe, out, "--resume", "auto") as second:
            assert second.codes() == [1, 1]
            assert re.search(r"Another run is writing to .*out \(process \d+ on ", second.said(0)), second.said(0)
        assert all(process.poll() is None for process in run.processes)


def test_a_run_does_not_begin_beside_checkpoints(recipe, whole, tmp_path):
    out = tmp_path / "out"
    ppo_runs.finish(recipe, out, "--num_iterations", "2")
    with ppo_runs.start(recipe, out) as run:
        assert run.codes() == [1, 1]
        assert "of an earlier run: go on from it with --resume auto, begin anew with --resume never" in run.said(0)
        assert "PPO: " not in run.said(0), "it is said before models are built"
    assert not (out / ".lock").exists()
    said = ppo_runs.finish(recipe, out, "--resume", "never")
    assert "Going on" not in said and ppo_runs.outcome(out) == whole


def test_another_runs_checkpoint_is_refused(recipe, tmp_path):
    out = tmp_path / "out"
    ppo_runs.finish(recipe, out, "--num_iterations", "1")
    with ppo_runs.start(recipe, out, "--resume", "auto", "--kl_coef", "0.07") as run:
        assert run.codes() == [1, 1]
        assert "iteration_000001 is of another run: kl_coef was 0.05, is 0.07." in run.said(0)
