"""Runs on weights of 4 bits, on CPU ranks: adapters learn, the weights stay, exports say what the live model says."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from engines import IDS, said_by_folder, said_live
from peft import PeftModel
from runs import train
from stages import build, refusal
from test_laws import furthest
from test_lora_laws import ADAPTERS, STEADY, train_stage

from engine.distributed.export import export_huggingface
from engine.models.language_model import load_language_model
from engine.models.loading import load_tokenizer
from engine.models.lora import is_adapter

pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")


def stage(folder, name, **given):
    role = "reward" if name == "reward" else "model"
    defaults = {"lora": STEADY, "learning_rate": 1e-2, f"{role}__quantization": "nf4"}
    return tiny.stage_config(folder, name, model=tiny.WIDE_LLAMA, **defaults | given)


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", tiny.STAGES)
def test_a_stage_trains_adapters_on_4_bits_alike_everywhere(run_ranks, tmp_path, name):
    plain = run_ranks(train_stage, stage(tmp_path, name, zero_stage=0), world_size=1)[0]
    assert plain["metrics"][-1]["train/loss"] < plain["metrics"][0]["train/loss"], "it learns"
    head = {"model.score.weight"} if name == "reward" else set()
    assert {weight for weight in plain["changed"] if not is_adapter(weight)} == head
    if name == "dpo":
        assert plain["metrics"][0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for kind, checkpointing in ((2, True), ("strict", False), ("strict", True)):
        config = stage(tmp_path, name, gradient_checkpointing=checkpointing, **tiny.sharding(kind, tmp_path))
        close(run_ranks(train_stage, config)[0]["metrics"], plain["metrics"])


def test_a_precomputed_ref_of_4_bits_is_the_model_before_training(run_ranks, tmp_path):
    kept = run_ranks(train_stage, stage(tmp_path, "dpo", ref_logprobs="precomputed"))[0]["metrics"]
    assert kept[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def four_bits(folder, **given):
    roles = {f"{role}__quantization": "nf4" for role in ("actor", "critic", "reward")}
    return tiny.ppo_config(folder, model=tiny.WIDE_LLAMA, **ADAPTERS | roles | given)


def test_ppo_runs_on_4_bits(run_ranks, tmp_path):
    plain = run_ranks(train, four_bits(tmp_path, zero_stage=2, actor__learning_rate=1e-2))[0]["metrics"]
    assert plain[0]["kl/ref_mean"] == 0 and plain[0]["policy/first_log_ratio_max"] < 1e-4
    assert abs(plain[-1]["kl/ref_mean"]) > 1e-4
    config = four_bits(tmp_path, actor__learning_rate=1e-2, **tiny.sharding("strict", tmp_path))
    assert furthest(run_ranks(train, config)[0]["metrics"], plain) < 1e-4


def test_the_ref_can_have_4_bits_of_its_own(run_ranks, tmp_path):
    config = tiny.ppo_config(tmp_path, model=tiny.WIDE_LLAMA, ref__quantization="nf4", zero_stage=2, num_iterations=1)
    run = run_ranks(train, config)[0]
    assert run["frozen"] == 2
    assert abs(run["metrics"][0]["kl/ref_mean"]) > 1e-4, "it is the actor's start, rounded"


def export_both(config, folder):
    trainer, minibatches, *_ = build(config)
    for examples in minibatches:
        trainer.step(examples)
    before, tokenizer = said_live(trainer.model, "actor"), load_tokenizer(config.model.model_name_or_path)
    for form in ("merged", "adapter"):
        export_huggingface(trainer.model, Path(folder) / form, tokenizer, form=form)
    assert torch.equal(said_live(trainer.model, "actor"), before), "exporting changes nothing"
    return before


@torch.no_grad()
def said_by_adapter(folder, model):
    quantised = load_language_model(model, dtype=torch.float32, quantization="nf4").model
    logits = PeftModel.from_pretrained(quantised, folder).eval()(IDS).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("model", [tiny.WIDE_LLAMA, tiny.WIDE_GPT2])
@pytest.mark.parametrize("kind", [2, "strict"])
def test_an_export_says_what_the_engine_says(run_ranks, tmp_path, kind, model):
    """Merged it is a plain model of the run's dtype; the adapter belongs to the model in 4 bits."""
    config = tiny.stage_config(
        tmp_path, "sft", model=model, model__quantization="nf4", lora=STEADY, **tiny.sharding(kind, tmp_path)
    )
    live, _ = run_ranks(export_both, config, str(tmp_path))
    torch.testing.assert_close(said_by_folder(tmp_path / "merged", "actor"), live, rtol=0, atol=1e-5)
    torch.testing.assert_close(said_by_adapter(tmp_path / "adapter", model), live, rtol=0, atol=1e-5)
    assert "quantization" not in (tmp_path / "merged" / "config.json").read_text()


def test_what_cannot_be_quantised_is_one_message(run_ranks, tmp_path):
    config = tiny.stage_config(tmp_path, "sft", model__quantization="nf4", lora=STEADY)
    for said in run_ranks(refusal, "sft", config):
        assert said.startswith("ValueError: quantization: ") and "has 32 inputs" in said
