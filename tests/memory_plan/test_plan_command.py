"""`launch/plan.py`: what it says and refuses, in this process."""

import sys

import pytest
import tiny
import yaml

from engine.config import as_dict, run
from engine.memory_plan.recommendation import Recommendation
from launch import plan


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """`planned(*flags)` -> exit code or message of the command for a tiny run, and what it printed. The run's recipe
    names no folder to write to.
    """
    recipe = {name: value for name, value in as_dict(tiny.ppo_config(tmp_path)).items() if name != "output_dir"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))

    def end_and_words(*flags: str):
        given = ["--config", str(tmp_path / "run.yaml"), "--world_size", "2", "--device_memory", "1GiB", *flags]
        monkeypatch.setattr(sys, "argv", ["plan.py", *given])
        try:
            run(plan.main)
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return None, capsys.readouterr().out

    return end_and_words


def test_what_fits_is_said_to_with_what_is_left(planned):
    code, said = planned("--host_memory", "1GiB")
    assert code is None and "This fits, with 10% left free." in said and "Recommended:" in said


@pytest.mark.parametrize(("dtype", "meant"), [("auto", "bfloat16"), ("float32", "float32")])
def test_the_dtype_is_said(planned, dtype, meant):
    _, said = planned("--dtype", dtype)
    assert f"Peak on each of 2 ranks, in {meant}: " in said
    assert ("A run on a CPU is of float32: --dtype float32." in said) == (dtype == "auto")


def test_the_sizes_it_counts_are_said(planned):
    given = ("--data.max_prompt_tokens", "1200", "--rollout.max_response_tokens", "7")
    batches = ("--rollout_batch_size", "12", "--minibatch_size", "12", "--micro_batch_size", "3")
    _, said = planned(*given, *batches, "--rollout.micro_batch_size", "12")
    counted = "For prompts of 1,200 tokens and responses of 7, 3 of them in a forward pass, 6 written at the same time."
    assert said.count(counted) == 2, "of the config's plan and of the one that is recommended; a rank has 6 of the 12"


def test_what_is_too_small_is_named(planned, monkeypatch):
    monkeypatch.setattr(plan, "recommendation", lambda *_: Recommendation(None, None, None, ("no way",)))
    code, said = planned("--host_memory", "0.01MB")
    (verdict,) = (line for line in said.splitlines() if "DOES NOT FIT" in line)
    assert "into a machine's own memory (" in verdict and "device" not in verdict and code == 1
    _, said = planned("--device_memory", "0.01MB", "--host_memory", "0.01MB")
    (verdict,) = (line for line in said.splitlines() if "DOES NOT FIT" in line)
    assert "a rank's device (" in verdict and "of 0.01 MiB, 10% of which are left free" in verdict
    assert " nor into a machine's own memory" in verdict


@pytest.mark.parametrize("flag", ["world_size", "ranks_per_node"])
def test_no_ranks_are_refused(planned, flag):
    assert planned(f"--{flag}", "0") == (f"ValueError: {flag}=0 must be at least 1.", "")


def test_help_lists_the_machine_and_names_the_place_of_the_rest(planned):
    code, said = planned("--help")
    assert code == 0 and "--host_memory" in said and "launch/train_ppo.py --help" in " ".join(said.split())
