"""Runs with an adapter: the laws of the other runs hold, and the ref is the trained model without its adapter."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from runs import Log, build, train, weights
from stages import build as build_stage
from stages import refusal
from test_laws import furthest

from engine.config import LoRAConfig, SteadyLoRAConfig
from engine.distributed.initialize import WithoutAdapter
from engine.models.lora import is_adapter

ADAPTERS = dict(actor__lora=SteadyLoRAConfig(r=4), critic__lora=SteadyLoRAConfig(r=4))
STEADY = LoRAConfig(r=4, dropout=0.0)


def ppo(folder, **given):
    return tiny.ppo_config(folder, **ADAPTERS | dict(actor__learning_rate=1e-2, critic__learning_rate=1e-2) | given)


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(train, ppo(tmp_path_factory.mktemp("plain"), zero_stage=0))


@pytest.mark.parametrize(("world_size", "kind"), [(1, 0), (2, 2), (2, "strict"), (1, "strict")])
def test_neither_sharding_nor_ranks_change_the_numbers_of_ppo(run_ranks, tmp_path, plain, world_size, kind):
    run = run_ranks(train, ppo(tmp_path, **tiny.sharding(kind, tmp_path)), world_size=world_size)[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5


@pytest.mark.parametrize("kind", [0, "strict"])
def test_gradient_checkpointing_leaves_the_numbers_of_ppo_alone(run_ranks, tmp_path, plain, kind):
    on = dict(actor__gradient_checkpointing=True, critic__gradient_checkpointing=True)
    run = run_ranks(train, ppo(tmp_path, **on, **tiny.sharding(kind, tmp_path)))[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5


def test_ppo_starts_at_its_ref_and_leaves_it(plain):
    first, last = plain[0]["metrics"][0], plain[0]["metrics"][-1]
    assert first["kl/ref_mean"] == 0, "the same weights, the same kernels"
    assert first["policy/first_log_ratio_max"] < 1e-4
    assert abs(last["kl/ref_mean"]) > 1e-4


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2])
def test_the_ratio_is_one_while_nothing_is_learnt(run_ranks, tmp_path, model):
    still = dict(actor__learning_rate=0.0, critic__learning_rate=0.0, rollout__temperature=0.7, model=model)
    for metrics in run_ranks(train, ppo(tmp_path, zero_stage=2, **still))[0]["metrics"]:
        assert metrics["policy/first_log_ratio_max"] < 1e-4
        assert metrics["policy/ratio_max"] < 1 + 1e-4
        assert metrics["kl/ref_mean"] == 0


def frozen_parts(config):
    """Whether PPO leaves the weights under the adapters as they were, and builds no second model for the ref."""
    trainer, prompts = build(config)
    roles = {role: getattr(trainer, role) for role in ("actor", "critic")}
    before = {role: weights(engine) for role, engine in roles.items()}
    trainer.train(prompts, config.num_iterations, Log())
    changed = {
        role: {name for name, now in weights(engine).items() if not torch.equal(now, before[role][name])}
        for role, engine in roles.items()
    }
    return changed, isinstance(trainer.ref, WithoutAdapter) and trainer.ref.module is trainer.actor.module


@pytest.mark.parametrize("kind", [2, "strict"])
def test_ppo_changes_adapters_and_heads_alone(run_ranks, tmp_path, kind):
    for changed, shared in run_ranks(frozen_parts, ppo(tmp_path, **tiny.sharding(kind, tmp_path))):
        assert shared
        assert changed["actor"] and all(is_adapter(name) for name in changed["actor"])
        assert {name for name in changed["critic"] if not is_adapter(name)} == {"model.score.weight"}


@pytest.mark.parametrize("kind", [0, "strict"])
def test_the_ref_is_the_one_that_would_have_been_built(run_ranks, tmp_path, plain, kind):
    """A ref of its own, of the same model, gives the same run; also where the loss asks it for whole distributions."""
    own = run_ranks(train, ppo(tmp_path, ref__model_name_or_path=tiny.LLAMA, **tiny.sharding(kind, tmp_path)))[0]
    assert own["frozen"] == 2
    assert furthest(own["metrics"], plain[0]["metrics"]) < 1e-5
    full = dict(kl_placement="loss", kl_estimator="full", kl_coef=0.5, **tiny.sharding(kind, tmp_path))
    full |= dict(actor__gradient_checkpointing=True)
    shared = run_ranks(train, ppo(tmp_path, **full))[0]
    own = run_ranks(train, ppo(tmp_path, ref__model_name_or_path=tiny.LLAMA, **full))[0]
    assert furthest(shared["metrics"], own["metrics"]) < 1e-5
    assert furthest(shared["metrics"], plain[0]["metrics"]) > 1e-3


def train_stage(config):
    """A stage's metrics, what it changed, and DPO's ref before and after."""
    trainer, minibatches, held_out, ref = build_stage(config)
    examples = minibatches.dataset.examples
    asked = trainer.objective.ref_logprobs if ref is not None else None
    before, ref_before = weights(trainer.model), asked and asked(examples)
    log = Log()
    trainer.train(minibatches, config.num_iterations, log, held_out)
    after = weights(trainer.model)
    return {
        "metrics": log.metrics,
        "changed": {name for name in after if not torch.equal(after[name], before[name])},
        "ref is the model": isinstance(ref, WithoutAdapter),
        "ref stayed": asked and torch.equal(asked(examples), ref_before),
        "moved": asked and not torch.equal(trainer.numbers(examples), ref_before),
    }


def stage(folder, name, **given):
    return tiny.stage_config(folder, name, **dict(lora=STEADY, learning_rate=1e-2) | given)


@pytest.fixture(scope="module", params=tiny.STAGES)
def plain_stage(request, run_ranks, tmp_path_factory):
    """The run of a stage that the others are compared with: ZeRO 0, two ranks."""
    config = stage(tmp_path_factory.mktemp("plain"), request.param, zero_stage=0)
    return request.param, run_ranks(train_stage, config)[0]


@pytest.mark.parametrize(
    ("world_size", "kind", "checkpointing"), [(1, 0, False), (2, 2, True), (2, "strict", False), (2, "strict", True)]
)
def test_neither_sharding_nor_ranks_nor_checkpointing_change_the_numbers_of_a_stage(
    run_ranks, tmp_path, plain_stage, world_size, kind, checkpointing
):
    name, expected = plain_stage
    config = stage(tmp_path, name, gradient_checkpointing=checkpointing, **tiny.sharding(kind, tmp_path))
    run = run_ranks(train_stage, config, world_size=world_size)[0]
    for ours, theirs in zip(run["metrics"], expected["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_stage_changes_the_adapter_and_a_scalar_head_alone(plain_stage):
    name, run = plain_stage
    assert run["metrics"][-1]["train/loss"] < run["metrics"][0]["train/loss"], "it learns"
    assert any(is_adapter(weight) for weight in run["changed"])
    head = {"model.score.weight"} if name == "reward" else set()
    assert {weight for weight in run["changed"] if not is_adapter(weight)} == head


@pytest.mark.parametrize("kind", [0, 2, "strict"])
@pytest.mark.parametrize("given", [dict(lora=STEADY), dict(lora=LoRAConfig(r=4, dropout=0.5))])
def test_dpo_starts_at_ln_2_and_its_ref_stays(run_ranks, tmp_path, kind, given):
    for run in run_ranks(train_stage, stage(tmp_path, "dpo", **given, **tiny.sharding(kind, tmp_path))):
        assert run["ref is the model"] and run["ref stayed"] and run["moved"]
        assert run["metrics"][0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert run["metrics"][-1]["train/loss"] < math.log(2) - 1e-3


def test_dpo_is_the_same_with_a_ref_of_its_own_and_with_a_precomputed_one(run_ranks, tmp_path):
    shared = run_ranks(train_stage, stage(tmp_path, "dpo"))[0]
    own = run_ranks(train_stage, stage(tmp_path, "dpo", ref__model_name_or_path=tiny.LLAMA))[0]
    kept = run_ranks(train_stage, stage(tmp_path, "dpo", ref_logprobs="precomputed"))[0]
    assert (shared["ref is the model"], own["ref is the model"], kept["ref is the model"]) == (True, False, False)
    for other in (own, kept):
        assert furthest(shared["metrics"], other["metrics"]) < 1e-5


def test_dropout_reaches_the_adapter(run_ranks, tmp_path):
    """From the second step: before, B is 0 and what is dropped makes no difference."""
    dropped = run_ranks(train_stage, stage(tmp_path, "sft", lora=LoRAConfig(r=4, dropout=0.5)))[0]["metrics"]
    steady = run_ranks(train_stage, stage(tmp_path, "sft"))[0]["metrics"]
    assert dropped[0]["train/loss"] == pytest.approx(steady[0]["train/loss"], abs=1e-6)
    assert abs(dropped[-1]["train/loss"] - steady[-1]["train/loss"]) > 1e-4


@pytest.mark.parametrize("kind", [2, "strict"])
def test_layers_that_are_not_there_are_one_message(run_ranks, tmp_path, kind):
    lora = replace(STEADY, target_modules=["q_proj", "query"])
    config = tiny.stage_config(tmp_path, "sft", lora=lora, **tiny.sharding(kind, tmp_path))
    for said in run_ranks(refusal, "sft", config):
        assert said.startswith("ValueError: lora.target_modules: query is no linear layer") and "There are" in said
