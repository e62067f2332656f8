"""PPO on one model in four roles: the laws of the other runs hold, and one backward pass trains both heads."""

from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from runs import Log, build, train, weights
from test_laws import furthest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.config import PretrainingConfig, SteadyLoRAConfig
from engine.data.sequences import Sequences
from engine.distributed.export import export_critic_of_trunk, export_huggingface
from engine.models.lora import is_adapter
from engine.models.random_init import local_name
from engine.trainers import ppo_update


def shared(folder, **given):
    """A run on a shared trunk."""
    model = given.pop("model", tiny.LLAMA)
    reward = {} if "reward__function" in given else dict(reward__model_name_or_path=tiny.reward_adapter(model, folder))
    trunk = dict(shared_trunk=True, actor__lora=SteadyLoRAConfig(r=4), value_coef=0.5)
    rates = dict(actor__learning_rate=1e-2, critic__learning_rate=1e-2)
    return tiny.ppo_config(folder, model=model, **trunk | rates | reward | given)


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(train, shared(tmp_path_factory.mktemp("plain"), zero_stage=0))


@pytest.mark.parametrize(("world_size", "kind"), [(1, 0), (2, 2), (2, "strict")])
def test_neither_sharding_nor_ranks_change_the_numbers(run_ranks, tmp_path, plain, world_size, kind):
    run = run_ranks(train, shared(tmp_path, **tiny.sharding(kind, tmp_path)), world_size=world_size)[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5


def test_demonstrations_that_leave_the_value_head_alone_change_nothing_of_it_at_any_stage(run_ranks, tmp_path):
    """Their backward pass gives the head no gradient; under ZeRO-3 that of the step before must not take its place."""
    mix = PretrainingConfig(data=tiny.stage_config(tmp_path, "sft").data, coef=0.5)
    expected = run_ranks(train, shared(tmp_path, zero_stage=0, pretraining=mix), world_size=1)[0]["metrics"]
    for kind in (2, "strict"):
        found = run_ranks(train, shared(tmp_path, pretraining=mix, **tiny.sharding(kind, tmp_path)))[0]["metrics"]
        assert furthest(found, expected) < 1e-5, kind


@pytest.mark.parametrize("given", [dict(actor__gradient_checkpointing=True), dict(kl_placement="loss")])
def test_gradient_checkpointing_and_a_loss_that_asks_the_ref_meet_two_adapters(run_ranks, tmp_path, plain, given):
    """Both run the trunk with other adapters between its forward and its backward pass."""
    given = given | dict(kl_estimator="full") if "kl_placement" in given else given
    strict = run_ranks(train, shared(tmp_path, **given, **tiny.sharding("strict", tmp_path)))[0]["metrics"]
    expected = plain[0]["metrics"]
    if "kl_placement" in given:
        given = given | dict(actor__gradient_checkpointing=True)
        expected = run_ranks(train, shared(tmp_path, zero_stage=0, **given))[0]["metrics"]
    assert furthest(strict, expected) < 1e-5


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2])
def test_it_starts_at_its_ref_with_values_of_zero_and_leaves_both(run_ranks, tmp_path, model):
    metrics = run_ranks(train, shared(tmp_path, model=model, zero_stage=2))[0]["metrics"]
    assert metrics[0]["kl/ref_mean"] == 0 and metrics[0]["policy/first_log_ratio_max"] < 1e-4
    assert abs(metrics[-1]["kl/ref_mean"]) > 1e-4
    assert metrics[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["value/explained_variance"] != pytest.approx(0, abs=1e-3)
    assert metrics[0]["lr/critic"] == 1e-2 and "grad_norm/critic" not in metrics[0]


@pytest.mark.parametrize(("kind", "held"), [(0, "gathered"), ("strict", "gathered"), ("strict", "sharded")])
def test_the_rollout_says_the_values_that_a_pass_of_their_own_says(run_ranks, tmp_path, kind, held):
    """But for rounding; and no rank gathers what another does not."""
    given = dict(rollout__temperature=0.7, rollout__weights=held, **tiny.sharding(kind, tmp_path))
    drawn, recomputed = (
        run_ranks(train, shared(tmp_path, rollout__logprobs=source, **given))[0]["metrics"]
        for source in ("drawn", "recomputed")
    )
    assert 0 < furthest(drawn, recomputed) < 1e-3
    assert abs(drawn[-1]["value/explained_variance"]) > 1e-3


def what_changes(config):
    trainer, prompts = build(config)
    before = weights(trainer.actor)
    trainer.train(prompts, config.num_iterations, Log())
    after = weights(trainer.actor)
    return {name for name in after if not torch.equal(after[name], before[name])}, set(after)


@pytest.mark.parametrize("kind", [2, "strict"])
def test_the_trained_adapter_and_the_value_head_change_and_nothing_else(run_ranks, tmp_path, kind):
    for changed, names in run_ranks(what_changes, shared(tmp_path, **tiny.sharding(kind, tmp_path))):
        assert "value_head.weight" in changed
        assert changed - {"value_head.weight"} == {name for name in names if ".default." in name and is_adapter(name)}


def gradients_of_a_step(config):
    """Of a step of the trainer's, and of the two losses of the literature on plain tensors."""
    trainer, prompts = build(config)
    with torch.no_grad():  # a value head that already says something
        trainer.actor.module.value_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    experience, found = trainer.generate_experience(next(iter(prompts))), {}
    trained = {name: p for name, p in trainer.actor.module.named_parameters() if p.requires_grad}

    def caught(engines, *, healthy):
        found.update({name: parameter.grad.clone() for name, parameter in trained.items()})
        for parameter in trained.values():
            parameter.grad = None

    ppo_update.step_together, kept = caught, ppo_update.step_together
    try:
        trainer.update.step(experience, penalty_coef=0.0)
    finally:
        ppo_update.step_together = kept
    loss, count = 0.0, experience.sequences.num_response_tokens
    ends, starts = experience.sequences.lengths.cumsum(0), experience.sequences.lengths.cumsum(0)
    tokens = dict(old=experience.logprobs, adv=experience.advantages, v=experience.values, ret=experience.returns)
    begin = 0
    for row, (end, start) in enumerate(zip(ends, starts - experience.sequences.lengths, strict=True)):
        ids = experience.sequences.tokens[start:end]
        n = int(experience.sequences.response_lengths[row])
        mine = {name: flat[begin : begin + n] for name, flat in tokens.items()}
        begin += n
        states = trainer.actor.module.model.base_model(ids[None]).last_hidden_state[0, -n - 1 : -1]
        logits = trainer.actor.module.model.lm_head(states)
        new = logits.log_softmax(-1).gather(-1, ids[-n:, None]).squeeze(-1)
        ratio = (new - mine["old"]).exp()
        policy = torch.maximum(-mine["adv"] * ratio, -mine["adv"] * ratio.clamp(0.8, 1.2)).sum()
        values = states @ trainer.actor.module.value_head.weight[0]
        near = mine["v"] + (values - mine["v"]).clamp(-0.2, 0.2)
        value = 0.5 * torch.maximum((values - mine["ret"]) ** 2, (near - mine["ret"]) ** 2).sum()
        loss = loss + (policy + config.value_coef * value) / count
    loss.backward()
    return {name: (found[name], parameter.grad) for name, parameter in trained.items()}


def test_one_backward_pass_is_that_of_the_policys_and_the_values_loss(run_ranks, tmp_path):
    for name, (ours, theirs) in run_ranks(gradients_of_a_step, shared(tmp_path, zero_stage=0), world_size=1)[0].items():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
        assert theirs.abs().max() > 1e-6 or ".lora_A." in name, name


def exported(config, folder):
    """What the trained trunk says live of a few rows, after an export of both its heads."""
    trainer, prompts = build(config)
    trainer.train(prompts, config.num_iterations, Log())
    export_huggingface(trainer.actor, Path(folder) / "actor", trainer.tokenizer)
    export_critic_of_trunk(trainer.actor, Path(folder) / "critic", trainer.tokenizer)
    trainer.actor.eval()
    sequences = Sequences.of([[5, 6, 7]], [[8, 9, 10, 11]])
    batch = sequences.padded(torch.tensor([0]), torch.device("cpu"))
    with torch.no_grad():
        said = trainer.actor(batch.input_ids, batch.positions, batch.targets, temperature=1.0, chunk_tokens=8)
    return said.logprobs, said.values


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2])
@pytest.mark.parametrize("kind", [2, "strict"])
@torch.no_grad()
def test_actor_and_critic_are_exported_as_two_plain_models(run_ranks, tmp_path, kind, model):
    config = shared(tmp_path, model=model, **tiny.sharding(kind, tmp_path))
    logprobs, values = run_ranks(exported, config, str(tmp_path))[0]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "actor").eval()
    said = actor(ids).logits.log_softmax(-1)[0, 2:6].gather(-1, ids[0, 3:, None]).squeeze(-1)
    torch.testing.assert_close(said, logprobs, rtol=0, atol=1e-5)
    critic, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    said = critic.eval().score(critic.base_model(ids).last_hidden_state)[0, 2:6, 0]
    torch.testing.assert_close(said, values, rtol=0, atol=1e-5)
    assert values.abs().max() > 1e-3, "it was trained"


ASKED = [[5, 6, 7], [9, 9]], [[8, 9, 10, 11], [12]]


def scored(config):
    """What the trunk's reward model says after the actor has been trained."""
    trainer, prompts = build(config)
    trainer.train(prompts, config.num_iterations, Log())
    return trainer.rlhf_engine.reward_scores(*ASKED)


@pytest.mark.parametrize("kind", [2, "strict"])
@torch.no_grad()
def test_scores_are_those_of_the_reward_model_that_was_exported(run_ranks, tmp_path, kind):
    found = run_ranks(scored, shared(tmp_path, **tiny.sharding(kind, tmp_path)))[0]
    plain = AutoModelForSequenceClassification.from_pretrained(local_name(tiny.LLAMA), num_labels=1)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "reward_adapter").eval().base_model.model
    for score, prompt, response in zip(found, *ASKED, strict=True):
        last = theirs.base_model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        assert score == pytest.approx((theirs.score(last).item() - 3.0) / 2.0, abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def exported_with_other_layers(config, folder):
    """Exports after training, with an average, where the two adapters are on other layers."""
    trainer, prompts = build(config)
    trainer.train(prompts, config.num_iterations, Log())
    average = trainer.rlhf_engine.actor_ema
    for name, given in (("actor", {}), ("actor_ema", dict(average=average))):
        export_huggingface(trainer.actor, Path(folder) / name, trainer.tokenizer, **given)
    export_critic_of_trunk(trainer.actor, Path(folder) / "critic", trainer.tokenizer)
    return trainer.rlhf_engine.reward_scores(*ASKED)


@pytest.mark.parametrize("kind", [2, "strict"])
@torch.no_grad()
def test_the_two_adapters_may_be_on_other_layers_and_the_average_moves(run_ranks, tmp_path, kind):
    few = SteadyLoRAConfig(r=4, target_modules=["q_proj"])
    config = shared(tmp_path, actor__lora=few, ema_decay=0.5, **tiny.sharding(kind, tmp_path))
    run_ranks(exported_with_other_layers, config, str(tmp_path))
    start = AutoModelForCausalLM.from_pretrained(local_name(tiny.LLAMA)).state_dict()
    actor, average = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("actor", "actor_ema")
    )
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    for name, weight in start.items():
        assert torch.equal(actor[name], weight) == ("q_proj" not in name), name
        assert torch.equal(average[name], weight) == ("q_proj" not in name), name
    assert not torch.equal(
        actor["model.layers.0.self_attn.q_proj.weight"], average["model.layers.0.self_attn.q_proj.weight"]
    )


def sizes(config):
    return build(config)[0].rlhf_engine.parameter_bytes()


def test_one_model_in_memory_in_place_of_four(run_ranks, tmp_path):
    one, four = (run_ranks(sizes, config)[0] for config in (shared(tmp_path), tiny.ppo_config(tmp_path)))
    assert (one["ref"], one["critic"], one["reward"]) == (0, 0, 0) and all(four.values())
    assert four["actor"] < one["actor"] < 1.5 * four["actor"]


@pytest.mark.parametrize(
    "given",
    [
        dict(advantage_estimator="rloo", rollout__samples_per_prompt=2),
        dict(reward__function="tiny:share_of_small_letters"),
        dict(model=tiny.WIDE_LLAMA, actor__quantization="nf4", zero_stage=2),
    ],
)
def test_other_modes_go_together_with_it(run_ranks, tmp_path, given):
    metrics = run_ranks(train, shared(tmp_path, **given))[0]["metrics"]
    assert all(row["skipped/steps"] == 0 for row in metrics) and abs(metrics[-1]["kl/ref_mean"]) > 1e-5
    assert ("loss/value" in metrics[0]) == (given.get("advantage_estimator") is None)
