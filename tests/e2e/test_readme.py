"""Every command of the README, run in its order in one folder: tiny models and few steps in place of big ones."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import ranks
import tiny
import yaml

from engine.config import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig, parse

README = (ranks.ROOT / "README.md").read_text()
# Each has a test of its own, or is what runs this one.
ELSEWHERE = {
    "bash tests/run.sh": "runs this test",
    "srun python": "tests/distributed/test_slurm.py",
    "source .venv/bin/activate": "the tests run in that environment",
}
PROGRAMS = ("bash ", "deepspeed ", "python ", "torchrun ", "srun ", "source ")
CONFIGS = {"sft": SFTConfig, "reward": RewardModelConfig, "dpo": DPOConfig, "ppo": PPOConfig}
MODELS = {
    "Qwen/Qwen2.5-0.5B": tiny.LLAMA,
    "Qwen/Qwen3-1.7B": tiny.LLAMA,
    "meta-llama/Llama-3.1-8B-Instruct": tiny.LLAMA,
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": tiny.score_head(tiny.LLAMA),
}
FEW = ["--num_iterations", "1", "--tracking.wandb", "disabled", "--micro_batch_size", "2", "--minibatch_size", "8"]
FEW += ["--data.max_prompt_tokens", "96"]
SMALL = {
    "sft": [*FEW, "--data.max_length", "120"],
    "reward": [*FEW, "--data.max_length", "120"],
    "dpo": [*FEW, "--data.max_length", "120"],
    "ppo": [*FEW, "--rollout_batch_size", "8", "--rollout.max_response_tokens", "8"],
}


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language, or of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for named, text in found if named == language]


def commands() -> list[str]:
    """A line each, without its remark, in the README's order."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines if line.startswith(PROGRAMS)]


def stage_of(command: str) -> str | None:
    found = re.search(r"launch/train_(\w+)\.py", command)
    return found and found.group(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user of the README stands: the project's folders, and the files that the README speaks of."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("launch", "ds_configs", "engine"):
        (path / name).symlink_to(ranks.ROOT / name)
    (my_run,) = (block for block in blocks("yaml") if "my_run.yaml" in block)
    for model, small in MODELS.items():
        my_run = my_run.replace(model, small)
    (path / "my_run.yaml").write_text(my_run)
    for block in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (path / named.group(1)).write_text(block)
    tiny.write_rows(path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    problems = [{"question": f"{number} + 2?", "answer": f"It is {number + 2}"} for number in range(40)]
    tiny.write_rows(path / "problems.jsonl", problems)
    demonstrations = tiny.write_rows(path / "demonstrations.jsonl", tiny.DEMONSTRATIONS)
    preferences = tiny.write_rows(path / "preferences.jsonl", tiny.PREFERENCES)
    (path / "my_sft.yaml").write_text(
        yaml.safe_dump({"model": {"model_name_or_path": tiny.LLAMA}, "data": {"train": demonstrations}})
    )
    (path / "my_reward.yaml").write_text(yaml.safe_dump({"data": {"train": preferences}}))
    (path / "hosts").write_text("localhost slots=2\n")
    return path


def as_run(command: str) -> list[str]:
    """The command with few ranks, tiny models and few steps."""
    for model, small in MODELS.items():
        command = command.replace(model, shlex.quote(small))
    command = re.sub(r"--num_accelerators \d+", "--num_accelerators 1", command)
    words = shlex.split(command)
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(ranks.free_port())]
    if stage := stage_of(command):
        words += SMALL[stage]
        if "gsm8k" in command:
            words += ["--data.train", "problems.jsonl", "--data.train_subset", "null"]
    elif "doctor.py --config" in command:
        words += SMALL["ppo"]
    return words


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, **ranks.OFFLINE, "PYTHONPATH": os.pathsep.join([ranks.OFFLINE["PYTHONPATH"], str(folder)])}


def ssh_goes_to(host: str) -> bool:
    """Without a password."""
    asked = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=3", host, "true"]
    return shutil.which("ssh") is not None and subprocess.run(asked, capture_output=True, check=False).returncode == 0


def run(words: list[str], folder: Path) -> str:
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = subprocess.Popen(words, cwd=folder, env=environment(folder), start_new_session=True, **pipes)
    try:
        out, err = started.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # its ranks too
        raise
    assert started.returncode == 0, f"{words}\n{out[-2000:]}\n{err[-3000:]}"
    return out


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_of_the_readme_runs(command, folder):
    if why := next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None):
        pytest.skip(why)
    if "--hostfile" in command and not ssh_goes_to("localhost"):
        pytest.skip("DeepSpeed's launcher asks every host of a hostfile by ssh, and localhost does not answer")
    if command == "bash launch/quickstart.sh":
        if not (ranks.ROOT / ".venv/.install_stamp").is_file():
            pytest.skip("it would install: there is no .venv of tests/run.sh's")
        # Two steps a stage: `deepspeed` is a function of the shell's, which calls the command with more flags. At first
        # it fails at the second stage.
        few = 'command deepspeed "$@" --num_iterations 2 --tracking.wandb disabled'
        quickstart = f"bash {ranks.ROOT}/launch/quickstart.sh {folder}/runs/quickstart"
        fails = f'deepspeed() {{ [[ "$*" != *train_reward* ]] && {few}; }}; export -f deepspeed; ! {quickstart}'
        said = run(["bash", "-c", fails], folder)
        assert "quickstart: reward" in said and "quickstart: ppo" not in said
        said = run(["bash", "-c", f"deepspeed() {{ {few}; }}; export -f deepspeed; {quickstart}"], folder)
        assert "quickstart: sft is done" in said and "SFT:" not in said
        assert "quickstart: done, the last part in" in said
        return
    run(as_run(command), folder)
    if stage_of(command):
        output = re.search(r"--output_dir (\S+)", command)
        assert (folder / output.group(1) / "metrics.jsonl").read_text()


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(commands()) if stage_of(command)])
def test_the_sizes_of_a_command_divide_among_its_ranks(command, folder, monkeypatch):
    """Those that it is run with in the README, and not those of the test above."""
    monkeypatch.chdir(folder)
    if (found := re.search(r"(?:--num_accelerators|--nproc_per_node) (\d+)", command)) is None:
        pytest.skip("one rank")
    nodes = 2 if "--hostfile" in command else 1
    flags = shlex.split(command.split(".py ", 1)[1])
    config = parse(CONFIGS[stage_of(command)], flags)
    config.check_world_size(int(found.group(1)) * nodes)


def test_the_loop_in_python_runs(folder):
    (program,) = (block for block in blocks("python") if "parse(PPOConfig)" in block)
    (folder / "my_loop.py").write_text(program)
    run(["python", "my_loop.py", "--config", "my_run.yaml", "--output_dir", "runs/loop", *SMALL["ppo"]], folder)
    assert (folder / "runs/loop/actor/model.safetensors").is_file()


def test_the_score_service_of_the_readme_answers(folder):
    """`python launch/serve_scores.py my_scores:exact --port 8765`, on a free port."""
    (command,) = re.findall(r"`(python launch/serve_scores\.py [^`]*)`", README)
    (folder / "answers.jsonl").write_text((folder / "problems.jsonl").read_text())
    port = str(ranks.free_port())
    server = subprocess.Popen(
        shlex.split(command.replace("8765", port)),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert port in server.stdout.readline()
        flags = ["--reward.model_name_or_path", "null", "--reward.zero_stage", "null"]
        flags += ["--reward.url", f"http://127.0.0.1:{port}", "--data.train", "answers.jsonl"]
        words = ["python", "launch/train_ppo.py", "--config", "my_run.yaml", "--output_dir", "runs/service", *flags]
        run([*words, *SMALL["ppo"]], folder)
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_every_file_of_the_engine_is_in_the_tree():
    (tree,) = (block for block in blocks("") if block.startswith("engine/"))
    files = [path for folder in ("engine", "launch") for path in (ranks.ROOT / folder).rglob("*.py")]
    missing = [path.name for path in files if path.name not in tree and path.name != "__init__.py"]
    assert not missing
    promised = set(re.findall(r"\b\w+\.py\b", tree))
    assert promised <= {path.name for path in files}


def test_what_is_run_elsewhere_is_in_the_readme():
    assert all(any(command.startswith(start) for command in commands()) for start in ELSEWHERE)
    assert len(commands()) > 10
