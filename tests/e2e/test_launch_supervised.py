"""SFT, reward model and DPO as a user starts them; what is wrong with the data or a model is one message."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import stages
import tiny
import torch
import yaml
from test_chain import permuted_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.config import as_dict, parse
from engine.models.random_init import byte_tokenizer, local_name

SHOWN = {
    "sft": {"train/loss", "train/perplexity"},
    "reward": {"train/loss", "train/accuracy", "train/margin", "train/score_mean", "train/length_correlation"},
    "dpo": {"train/loss", "train/accuracy", "train/margin", "train/reward_chosen", "train/logprobs_rejected"},
}
ALWAYS = {"grad_norm", "lr", "skipped/steps", "time/step_s", "speed/tokens_per_s", "memory/peak_gib"}


def launched(stage: str, config, *flags: str) -> subprocess.CompletedProcess:
    """`deepspeed launch/train_<stage>.py` with two ranks."""
    recipe = Path(config.output_dir).with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    port = str(ranks.free_port())
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", port]
    command += [f"launch/train_{stage}.py", "--config", str(recipe), *flags]
    environment = {**os.environ, **ranks.OFFLINE}
    return subprocess.run(
        command, cwd=ranks.ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_run_leaves_a_complete_folder(tmp_path, stage):
    config = tiny.stage_config(tmp_path, stage, num_iterations=2, data__eval_fraction=0.3)
    role = "reward" if stage == "reward" else "model"
    done = launched(stage, config, f"--{role}.zero_stage", "3", "--seed", "5")
    assert done.returncode == 0, done.stderr[-2000:]
    out = Path(config.output_dir)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert SHOWN[stage] | ALWAYS <= lines[1].keys()
    assert "eval/loss" in lines[0] and "eval/loss" in lines[2] and "train/loss" not in lines[0]
    again = parse(type(config), ["--config", str(out / "config.yaml")])
    assert again.seed == 5 and getattr(again, role).zero_stage == 3
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(out / role), AutoTokenizer.from_pretrained(out / role)
    assert model(torch.tensor([tokenizer("hello")["input_ids"]])).logits.isfinite().all()
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert {path.name for path in out.iterdir()} == {"config.yaml", "versions.json", "metrics.jsonl", role}
    assert done.stdout.count("Done: 2 steps") == 1


def row(stage: str, **changes):
    return dict((tiny.DEMONSTRATIONS if stage == "sft" else tiny.PREFERENCES)[0]) | changes


def without(stage: str, column: str):
    return {name: cell for name, cell in row(stage).items() if name != column}


LONG = "a" * 200
GOOD = {stage: row(stage) for stage in tiny.STAGES}
BAD_ROWS = [
    *(pytest.param(stage, [], r"{file} holds no rows\.", id=f"{stage} empty") for stage in tiny.STAGES),
    pytest.param("sft", [without("sft", "prompt")], r"{file} has no column prompt .*--data\.prompt_column\.", id="p"),
    pytest.param(
        "sft", [without("sft", "response")], r"{file} has no column response .*--data\.response_column\.", id="r"
    ),
    *(
        pytest.param(
            stage, [without(stage, name)], rf"{{file}} has no column {name}; its columns are .*", id=f"{stage} {name}"
        )
        for stage in ("reward", "dpo")
        for name in ("chosen", "rejected")
    ),
    *(
        pytest.param(
            stage,
            [GOOD[stage], row(stage, **{name: cell})],
            rf"{{file}}, line 2, column '{name}': .*",
            id=f"{stage} {name} {cell}",
        )
        for stage, name in [("sft", "prompt"), ("sft", "response"), ("reward", "chosen"), ("dpo", "rejected")]
        for cell in (7, None, ["x"])
    ),
    *(
        pytest.param(
            stage,
            [row(stage, rejected="b")] * 3,
            r"3 of 3 pairs of {file} have chosen == rejected: nothing can be learned from them\.",
            id=f"{stage} equal",
        )
        for stage in ("reward", "dpo")
    ),
    *(
        pytest.param(
            stage,
            [row(stage, prompt=LONG)] * 3,
            r"3 of 3 (rows|pairs) of {file} exceed .*: dropping them leaves nothing\. Raise the limit\.",
            id=f"{stage} long",
        )
        for stage in tiny.STAGES
    ),
]


@pytest.mark.parametrize(("stage", "rows", "said"), BAD_ROWS)
def test_bad_rows_are_one_message(run_ranks, tmp_path, stage, rows, said):
    config = tiny.stage_config(tmp_path, stage, rows=rows)
    file = str(config.data.train).replace(".", r"\.")
    for message in run_ranks(stages.refusal, stage, config, timeout_s=60):
        assert re.fullmatch(f"ValueError: {said.replace('{file}', file)}", message), message
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_reward_model_is_no_model_to_fine_tune(run_ranks, tmp_path, strict_z3, stage):
    config = tiny.stage_config(tmp_path, stage, model=tiny.score_head(tiny.LLAMA), ds_config=strict_z3)
    for message in run_ranks(stages.refusal, stage, config, timeout_s=60):
        assert message.startswith("ValueError: random://llama") and message.endswith("Is it a reward model?")
        assert "\n" not in message


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_tokenizer_without_an_end_is_refused(run_ranks, tmp_path, stage):
    folder = tmp_path / "endless"
    shutil.copytree(local_name(tiny.LLAMA), folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    for message in run_ranks(stages.refusal, stage, tiny.stage_config(tmp_path, stage, model=str(folder))):
        assert message == (f"ValueError: The tokenizer of {folder} has no end-of-sequence token: nothing could end.")


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_model_too_small_for_the_lengths_is_refused(run_ranks, tmp_path, stage):
    config = tiny.stage_config(tmp_path, stage, data__max_length=1024)
    for message in run_ranks(stages.refusal, stage, config):
        assert "was made for sequences of 512 tokens, and data.max_length = 1024" in message


def test_a_conversation_that_the_template_refuses_is_one_message(run_ranks, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('Conversation roles must alternate') }}")
    config = tiny.stage_config(tmp_path, "sft", data__prompt_format="chat", data__chat_template=str(template))
    for message in run_ranks(stages.refusal, "sft", config):
        assert "sft.jsonl, line 1: " in message and "roles must alternate" in message


@pytest.mark.parametrize("fault", ["other tokens", "too few tokens", "too few positions"])
def test_a_ref_that_does_not_read_the_models_tokens_is_refused(run_ranks, tmp_path, fault):
    if fault == "other tokens":
        ref = str(tmp_path / "ref")
        shutil.copytree(local_name(tiny.LLAMA), ref)
        permuted_tokenizer().save_pretrained(ref)
    else:
        few = "&vocab_size=100" if fault == "too few tokens" else "&max_position_embeddings=16"
        ref = tiny.LLAMA.replace("&max_position_embeddings=512", "") + few
    config = tiny.stage_config(tmp_path, "dpo", ref__model_name_or_path=ref)
    for message in run_ranks(stages.refusal, "dpo", config):
        assert message.startswith("ValueError: The ref")


def test_the_memory_plan_of_an_earlier_run_is_neither_shown_nor_kept(run_ranks, tmp_path):
    config = tiny.stage_config(tmp_path, "sft", num_iterations=1)
    plan = Path(config.output_dir) / "memory_plan.json"
    plan.parent.mkdir()
    plan.write_text('{"peak_bytes": 1073741824}')
    (said, _) = run_ranks(stages.script, "sft", config)
    assert "SFT: 1 steps" in said["printed"] and "a peak of" not in said["printed"]
    assert not plan.exists()


def test_a_run_whose_numbers_are_not_finite_leaves_no_model(run_ranks, tmp_path):
    config = tiny.stage_config(tmp_path, "sft", learning_rate=1e30, num_iterations=3, max_skipped_steps=1)
    with pytest.raises(ranks.RankFailed, match="not finite"):
        run_ranks(stages.script, "sft", config, timeout_s=60)
    assert not (Path(config.output_dir) / "model").exists()
