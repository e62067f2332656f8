"""What a user may call a model, and what is said of everything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reciting import BYTE, generated, lines_of, reciting, stirred
from transformers import AutoModelForCausalLM

from engine.answering.answerer import labels
from engine.answering.model_folder import load_for_answering, model_folder


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    return reciting(tmp_path_factory.mktemp("reciter"), "né日🙂!")


def adapter_of(base: str, folder: Path) -> tuple[str, str]:
    """An adapter that does something, and the model that it is merged to."""
    torch.manual_seed(3)
    is_gpt2 = "gpt2" in AutoModelForCausalLM.from_pretrained(base).config.model_type
    form = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["c_attn"] if is_gpt2 else ["q_proj", "down_proj"],
        init_lora_weights=False,
        fan_in_fan_out=is_gpt2,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), form)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    BYTE.save_pretrained(folder / "merged")
    return str(folder / "adapter"), str(folder / "merged")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_answers_as_the_model_it_is_merged_to(tmp_path, family):
    """Its folder has no tokenizer, as PEFT leaves it: it is the base's."""
    base = stirred(tiny.MODELS[family], tmp_path / "base")
    adapter, merged = adapter_of(base, tmp_path)
    prompts, said = tiny.write_prompts(tmp_path), {}
    for name in (base, adapter, merged):
        flags = ("--model", name, "--prompts", prompts, "--temperature", "0", "--max_response_tokens", "12")
        assert generated(*flags, "--output", tmp_path / "answers.jsonl") is None
        said[name] = lines_of(tmp_path / "answers.jsonl")
    assert said[adapter] == said[merged] != said[base]


def test_a_run_stands_for_what_it_has_exported(tmp_path, reciter):
    shutil.copytree(reciter, tmp_path / "ppo" / "actor")
    shutil.copytree(reciter, tmp_path / "sft" / "model")
    (tmp_path / "ppo" / "critic").mkdir()
    assert model_folder(str(tmp_path / "ppo")) == str(tmp_path / "ppo" / "actor")
    assert model_folder(str(tmp_path / "sft")) == str(tmp_path / "sft" / "model")
    assert model_folder(reciter) == reciter
    assert model_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_labels_are_as_short_as_they_can_be():
    assert labels(["runs/ppo"]) == ["ppo"]
    assert labels(["runs/a/actor", "runs/b/actor"]) == ["a/actor", "b/actor"]
    assert labels(["runs/a", "runs/a"]) == ["model", "other"]


def test_the_folder_one_stands_in_is_called_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "ppo").mkdir()
    monkeypatch.chdir(tmp_path / "ppo")
    assert labels(["."]) == ["ppo"]
    assert labels([".", "../sft"]) == ["ppo", "sft"]


def test_bfloat16_is_loaded_as_such_with_exact_rotary_frequencies(reciter):
    model, _ = load_for_answering(reciter, dtype=torch.bfloat16, chat_template=None)
    assert model.lm_head.weight.dtype == torch.bfloat16 and not model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def planted(folder: Path, reciter: str) -> dict[str, tuple[list[str], str]]:
    """Flags with something wrong in them, and what is said."""
    folder.mkdir(exist_ok=True)
    rows = tiny.write_rows(folder / "rows.jsonl", [{"prompt": "x", "n": 1}])
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    (folder / "empty").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_text("seed: 0\n")
    shutil.copytree(tiny.reward_adapter(tiny.LLAMA, folder), folder / "reward_run" / "reward")
    torn = shutil.copytree(reciter, folder / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    orphan, misfit, nameless = (folder / name for name in ("orphan", "misfit", "nameless"))
    adapter_of(reciter, folder)
    for copy in (orphan, misfit, nameless):
        shutil.copytree(folder / "adapter", copy)
    for copy, base in ((orphan, str(folder / "gone")), (misfit, tiny.LLAMA)):
        settings = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    (nameless / "adapter_config.json").write_text("{}")
    untaught = shutil.copytree(reciter, folder / "untaught")
    (untaught / "chat_template.jinja").unlink()
    answer = ["--prompts", rows, "--output", str(folder / "out.jsonl")]
    numbers = "gives numbers and writes no text. Name an actor."
    return {
        "no such folder": (["--model", f"{folder}/nothing", *answer], "there is no such folder"),
        "no model in it": (["--model", f"{folder}/empty", *answer], "holds no model"),
        "a run that goes on": (["--model", f"{folder}/unfinished", *answer], "has exported no model"),
        "a reward model's run": (["--model", f"{folder}/reward_run", *answer], numbers),
        "a reward model": (["--model", tiny.score_head(tiny.LLAMA), *answer], numbers),
        "a reward adapter": (["--model", f"{folder}/reward_adapter", *answer], numbers),
        "a reward model beside": (["--model", reciter, "--other", tiny.score_head(tiny.GPT2), *answer], numbers),
        "half of a file": (["--model", str(torn), *answer], "did not load"),
        "an adapter of nothing": (["--model", str(orphan), *answer], "is an adapter of"),
        "an adapter of another": (["--model", str(misfit), *answer], "does not fit"),
        "an adapter without a base": (["--model", str(nameless), *answer], "names no base model"),
        "no output": (["--model", reciter, "--prompts", rows], "name it with --output"),
        "no prompts": (["--model", reciter, "--output", "x.jsonl"], "name their file with --prompts"),
        "no such file": (["--model", reciter, *answer, "--prompts", f"{folder}/no.jsonl"], "there is no such file"),
        "a broken line": (["--model", reciter, *answer, "--prompts", f"{folder}/broken.jsonl"], "line 2"),
        "no such column": (["--model", reciter, *answer, "--prompt_column", "q"], "Name one with --prompt_column"),
        "its own input": (["--model", reciter, *answer, "--output", rows], "is the file of the prompts"),
        "a folder for output": (["--model", reciter, *answer, "--output", str(folder)], "cannot be written to"),
        "no such template": (["--model", reciter, *answer, "--chat_template", "no.jinja"], "chat_template=no.jinja"),
        "no template": (["--model", str(untaught)], "--prompt_format text"),
        "no context left": (["--model", reciter, *answer, "--max_response_tokens", "256"], "256 tokens that"),
        "no such device": (["--model", reciter, *answer, "--device", "gpu"], "device=gpu is no device"),
        "no such GPU": (["--model", reciter, *answer, "--device", "cuda:99"], "Name another, or cpu"),
        "no dtype of a CPU's": (["--model", reciter, *answer, "--dtype", "float16", "--device", "cpu"], "float16"),
        "too cold": (["--model", reciter, *answer, "--temperature", "-1"], "temperature=-1"),
        "too narrow": (["--model", reciter, *answer, "--top_p", "0"], "top_p=0"),
        "no batch": (["--model", reciter, *answer, "--batch_size", "0"], "batch_size=0 must be at least 1"),
        "a system message of none": (["--model", reciter, "--system", "s", "--prompt_format", "text"], "system begins"),
        "a misspelt flag": (["--model", reciter, *answer, "--temprature", "1"], "--temperature"),
    }


def test_what_is_wrong_is_said_in_a_sentence(tmp_path, reciter):
    """Exit code 1 is what a message for sys.exit comes to."""
    for name, (flags, wanted) in planted(tmp_path / "planted", reciter).items():
        said = generated(*flags)
        assert isinstance(said, str) and said.startswith("ValueError: "), (name, said)
        assert wanted in said and "--data." not in said, (name, said)
        assert len(said) < 600, (name, said)


def test_as_a_user_types_it(tmp_path, reciter):
    """Without a terminal lines are answered plainly, and DeepSpeed is not waited for; a mistake is exit code 1."""
    spy = "import sys, runpy; sys.argv[0] = 'launch/generate.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"{spy}; assert 'deepspeed' not in sys.modules"
    given = dict(cwd=ranks.ROOT, env={**os.environ, **ranks.OFFLINE}, capture_output=True, text=True, timeout=600)
    command = [sys.executable, "-c", code, "--model", reciter, "--temperature", "0"]
    done = subprocess.run(command, input="hi\n\n/reset\nho", **given, check=False)
    assert (done.returncode, done.stdout) == (0, "né日🙂!\nné日🙂!\n"), done.stderr
    done = subprocess.run([sys.executable, "launch/generate.py", "--model", tmp_path / "no"], **given, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {tmp_path / 'no'}: there is no such folder.")
    assert "Traceback" not in done.stderr
