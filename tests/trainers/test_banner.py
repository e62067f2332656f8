"""banner.py: what is said of a run before it begins, on real ranks."""

import json
import sys
from pathlib import Path

import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from runs import build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.config import SteadyLoRAConfig
from engine.distributed.initialize import parameter_bytes_here
from engine.models.random_init import local_name
from engine.trainers.banner import ppo_banner


def banner(config):
    engine = build(config)[0].rlhf_engine
    return list(ppo_banner(config, engine, 3)), parameter_bytes_here(engine.actor)


def test_a_ppo_run_says_what_it_will_do(run_ranks, tmp_path):
    given = dict(actor__ds_config=tiny.strict_z3_file(tmp_path), critic__zero_stage=1, rollout__samples_per_prompt=2)
    lora = dict(actor__lora=SteadyLoRAConfig(r=8))
    config = tiny.ppo_config(tmp_path, **given, **lora, minibatch_size=8, kl_target=3.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "memory_plan.json").write_text(json.dumps({"peak_bytes": 3 * 2**29}))
    (lines, held), (_, others) = run_ranks(banner, config)
    base = AutoModelForCausalLM.from_pretrained(local_name(tiny.LLAMA)).num_parameters()
    score = tiny.score_head(tiny.LLAMA)
    head = AutoModelForSequenceClassification.from_pretrained(local_name(score)).num_parameters()
    # Of q and o, k and v, gate and up, down: 8 x (inputs + outputs), in two layers.
    adapter = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 64) + (64 + 32))
    assert lines[0] == "PPO: 3 iterations on 2 ranks (cpu)"
    words = {line.split()[0]: line.split()[1:] for line in lines[2:] if line.startswith("  ")}
    share = f"{100 * adapter / (base + adapter):.3g}%"
    assert words["actor"] == [f"{base + adapter:,}", share, "3", "float32", f"{held / 2**20:,.1f}"]
    assert words["critic"][:4] == [f"{head:,}", "100%", "1", "float32"]
    assert " ".join(words["ref"]) == "the trained model with its adapter switched off"
    assert words["reward"][:4] == [f"{head:,}", "frozen", "0", "float32"]
    assert " ".join(words["rollout"]) == "8 responses an iteration = 4 prompts x 2"
    step = "8 responses = micro-batch 2 x 2 ranks x accumulation 2, 2 steps an iteration in 2 epochs"
    assert " ".join(words["step"]) == step
    assert " ".join(words["plan"]) == "a peak of 1.50 GiB a rank"
    assert words["output"] == [config.output_dir]
    assert lines[-1] == "Note: kl_target has no effect in this run: kl_controller=fixed."
    assert 4 * (base + adapter) <= held + others < 4 * (base + adapter) + 2 * 4 * 200, (
        "padding of 200 parameters at most"
    )
    assert abs(held - others) < 4 * 200, "each holds its half"
