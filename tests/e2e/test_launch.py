"""The command line as a user types it, through the real deepspeed launcher."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import engine.tracking

SCORES = """
import os
import time
from pathlib import Path
import torch.distributed as dist

def good(prompts, responses, **columns):
    return [float(len(response)) for response in responses]

def dies(prompts, responses, **columns):
    if dist.get_rank() == 1:
        Path(__file__).with_name("died_at").write_text(str(time.time()))
        os._exit(7)
    return [0.0] * len(responses)

def raises(prompts, responses, **columns):
    if dist.get_rank() == 1:
        Path(__file__).with_name("died_at").write_text(str(time.time()))
        raise KeyError("no such gold answer")
    return [0.0] * len(responses)
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(*flags)` -> (finished process, output folder): two ranks on a tiny model."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "my_scores.py").write_text(SCORES)
    recipe = dict(
        actor=dict(model_name_or_path=tiny.LLAMA, learning_rate=1e-3),
        reward=dict(function="my_scores:good"),
        data=dict(train=tiny.write_prompts(folder), max_prompt_tokens=32),
        rollout=dict(max_response_tokens=8),
        rollout_batch_size=8,
        minibatch_size=4,
        micro_batch_size=2,
        num_iterations=2,
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(*flags: str, output: str):
        deepspeed = Path(sys.executable).with_name("deepspeed")
        port = str(ranks.free_port())
        command = [str(deepspeed), "--num_accelerators", "2", "--master_port", port, "launch/train_ppo.py"]
        command += ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / output), *flags]
        path = os.pathsep.join([ranks.OFFLINE["PYTHONPATH"], str(folder)])
        environment = {**os.environ, **ranks.OFFLINE, "PYTHONPATH": path}
        done = subprocess.run(
            command, cwd=ranks.ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        return done, folder / output

    return run


def test_a_run_without_a_critic_leaves_none_of_an_earlier_run(launch):
    (with_one, out), without = launch(output="again"), ("--advantage_estimator", "reinforce_plus_plus")
    assert with_one.returncode == 0 and (out / "critic" / "config.json").is_file()
    assert f"  models                {out}/actor, {out}/critic\n" in with_one.stdout
    done, _ = launch(*without, output="again")
    assert done.returncode == 0 and (out / "actor" / "config.json").is_file()
    assert not (out / "critic").exists() and f"  models                {out}/actor\n" in done.stdout


def test_a_run_leaves_a_complete_folder(launch):
    done, out = launch("--actor.zero_stage", "3", "--critic.zero_stage", "1", output="good")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    promised = set(re.findall(r"\b[a-z_]+/[a-z_0-9]+\b", engine.tracking.__doc__))
    assert promised <= lines[0].keys(), promised - lines[0].keys()
    assert {"prompt", "response", "score", "kl", "length"} <= json.loads(
        (out / "samples.jsonl").open().readline()
    ).keys()
    assert yaml.safe_load((out / "config.yaml").read_text())["actor"]["zero_stage"] == 3
    assert list((out / "wandb").glob("offline-run-*")), "W&B is offline without an account"
    actor = AutoModelForCausalLM.from_pretrained(out / "actor")
    critic = AutoModelForSequenceClassification.from_pretrained(out / "critic")
    assert actor.config.use_cache
    ids = torch.tensor([AutoTokenizer.from_pretrained(out / "actor")("hello")["input_ids"]])
    assert actor(ids).logits.isfinite().all()
    assert critic(ids).logits.shape == (1, 1)


@pytest.mark.parametrize("function", ["dies", "raises"])
def test_a_rank_that_fails_takes_the_job_down(launch, function):
    """Within 30 s: a promise, not a measurement."""
    done, out = launch("--reward.function", f"my_scores:{function}", output=function)
    assert done.returncode != 0
    assert time.time() - float(out.with_name("died_at").read_text()) < 30
    if function == "raises":
        assert done.stderr.count("ValueError: on rank 1 of 2") >= 2, "the same message on both ranks"
        assert re.search(r"KeyError: 'no such gold answer' \(.*my_scores\.py, line \d+\)", done.stderr)
        assert "Traceback" not in done.stderr, "a mistake of the user's is a message"


def test_a_bad_config_ends_every_rank_with_what_to_do(launch):
    done, out = launch("--minibatch_size", "2", output="sizes")
    assert done.returncode != 0
    assert done.stderr.count("minibatch_size=2 is not a multiple of micro_batch_size x world_size = 2 x 2 = 4") >= 2
    assert "Try --minibatch_size 4." in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_an_environment_that_is_not_there_is_told_before_models_are_built(launch):
    no_critic = ("--critic.model_name_or_path", "no/such/folder")  # what building it would stumble over
    done, out = launch("--rollout.environment", "my_scores:Nobody", *no_critic, output="nobody")
    assert done.returncode != 0
    assert done.stderr.count("ValueError: rollout.environment=my_scores:Nobody: my_scores has no class Nobody.") >= 2
    assert "Traceback" not in done.stderr and "no/such/folder" not in done.stderr
    assert not out.exists()
