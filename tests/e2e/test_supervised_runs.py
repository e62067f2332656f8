"""What a run of SFT, reward model or DPO does besides its steps: evaluates, agrees between ranks, checks, exports."""

import math
import os
from pathlib import Path

import pytest
import stages
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.distributed import comm
from engine.models.language_model import load_language_model
from engine.trainers import supervised_stages


@pytest.fixture
def stage_config(tmp_path):
    return lambda stage, **overrides: tiny.stage_config(tmp_path, stage, **overrides)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_evaluations_come_when_asked_for_and_rates_are_those_of_the_step(run_ranks, stage_config, stage):
    given = dict(eval_every=2, data__eval_fraction=0.3, lr_scheduler="linear", num_iterations=5)
    (run, _) = run_ranks(stages.train, stage_config(stage, **given))
    lines = dict(zip([0, 1, 2, 3, 4, 5], run["metrics"], strict=True))
    assert [number for number, line in lines.items() if "eval/loss" in line] == [0, 2, 4, 5]
    assert [lines[n]["lr"] for n in range(1, 6)] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


@torch.no_grad()
def test_scores_are_normalised_by_what_they_come_to_on_held_out_pairs(run_ranks, stage_config, tmp_path):
    rows = tiny.PREFERENCES[:2]
    config = stage_config(
        "reward", rows=tiny.PREFERENCES[2:], data__eval=tiny.write_rows(tmp_path / "eval.jsonl", rows)
    )
    run_ranks(stages.script, "reward", config)
    folder = Path(config.output_dir) / "reward"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [row["prompt"] + row[answer] + tokenizer.eos_token for row in rows for answer in ("chosen", "rejected")]
    scores = torch.cat([plain(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    assert plain.config.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert plain.config.score_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_chat_template_that_was_trained_with_is_exported(run_ranks, stage_config, tmp_path, stage):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}")
    config = stage_config(stage, data__chat_template=str(template), num_iterations=1)
    run_ranks(stages.script, stage, config)
    folder = Path(config.output_dir) / ("reward" if stage == "reward" else "model")
    assert AutoTokenizer.from_pretrained(folder).chat_template == template.read_text()


def with_a_scaled_head(name, **given):
    module = load_language_model(name, **given)
    plain = module.head.forward
    module.head.forward = lambda states: plain(states) / 4
    return module


def checked(stage, config):
    """What is said of a model whose logits the engine would get wrong."""
    supervised_stages.load_language_model = with_a_scaled_head
    try:
        {"sft": supervised_stages.sft_stage, "dpo": supervised_stages.dpo_stage}[stage](config)
    except ValueError as error:
        return str(error)
    finally:
        supervised_stages.load_language_model = load_language_model
    return "nothing"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_model_that_the_engine_would_get_wrong_is_refused(run_ranks, stage_config, stage):
    for said in run_ranks(checked, stage, stage_config(stage)):
        assert "other log-probabilities here than from its own logits" in said


def in_a_folder_of_its_own(stage, config, folder, rows_of_rank):
    """A run whose files are named relative to where the rank was started, and lie there as told."""
    there, here = Path(folder) / f"rank{comm.rank()}", os.getcwd()
    there.mkdir()
    for name, rows in rows_of_rank[comm.rank()].items():
        tiny.write_rows(there / name, rows)
    os.chdir(there)
    try:
        return stages.refusal(stage, config)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("which", ["train.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_ranks_with_other_data_are_refused(run_ranks, stage_config, tmp_path, stage, which):
    rows = tiny.DEMONSTRATIONS if stage == "sft" else tiny.PREFERENCES
    same = {"train.jsonl": rows[:4], "eval.jsonl": rows[4:6]}
    config = stage_config(stage, data__train="train.jsonl", data__eval="eval.jsonl")
    said = run_ranks(in_a_folder_of_its_own, stage, config, str(tmp_path), [same, same | {which: rows[6:]}])
    what = "the examples" if which == "train.jsonl" else "the held-out examples"
    assert all(f"Ranks disagree on {what}" in message and "Traceback" not in message for message in said), said


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_file_that_one_rank_lacks_is_the_same_message_on_all(run_ranks, stage_config, tmp_path, stage):
    rows = tiny.DEMONSTRATIONS if stage == "sft" else tiny.PREFERENCES
    config = stage_config(stage, data__train="train.jsonl")
    said = run_ranks(in_a_folder_of_its_own, stage, config, str(tmp_path), [{"train.jsonl": rows}, {}])
    assert said[0] == said[1] and "on rank 1 of 2" in said[0] and "train.jsonl" in said[0], said


def test_in_16_bits_dpo_begins_at_ln_2_too(run_ranks, stage_config):
    """The ref is asked in the micro-batches of training: others would round otherwise."""
    config = stage_config("dpo", dtype="bfloat16", num_iterations=1, micro_batch_size=1, minibatch_size=6)
    first = run_ranks(stages.train, config)[0]["metrics"][0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7) and first["train/accuracy"] == 0.5
