"""`lora` and `quantization` on the command line: where they stand, what they default to, what is refused."""

from dataclasses import replace

import pytest
import tiny
import yaml

from engine.config import DPOConfig, LoRAConfig, PPOConfig, SFTConfig, SteadyLoRAConfig, as_dict, parse

SFT = ["--model.model_name_or_path", "m", "--data.train", "d.jsonl", "--output_dir", "out"]
PPO = ["--actor.model_name_or_path", "m", "--reward.model_name_or_path", "r", "--data.train", "d", "--output_dir", "o"]


def test_there_is_no_adapter_unless_asked_for():
    for config_class, flags in ((SFTConfig, SFT), (SFTConfig, [*SFT, "--lora.r", "0"]), (DPOConfig, SFT)):
        config = parse(config_class, flags)
        assert not config.has_adapter and config.adapter is None and config.export_form == "merged"
        assert config.adapter_learning_rate == config.learning_rate
    assert not parse(PPOConfig, PPO).ref_is_the_actor


@pytest.mark.parametrize("written", ["lora: {}", "lora: {r: 8}"])
def test_an_empty_group_takes_the_literatures_defaults(tmp_path, written):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{model_name_or_path: m}}\ndata: {{train: d.jsonl}}\noutput_dir: out\n{written}\n")
    config = parse(SFTConfig, ["--config", str(path)])
    assert config.adapter == dict(r=8, alpha=16.0, dropout=0.05, target_modules=None)
    assert (config.adapter_learning_rate, config.export_form) == (1e-5, "merged")


def test_flags_reach_the_group_of_their_role():
    flags = ["--lora.r", "4", "--lora.alpha", "8", "--lora.target_modules", "[q_proj, v_proj]", "--lora.dropout", "0.1"]
    config = parse(SFTConfig, [*SFT, *flags, "--lora.learning_rate", "2e-4", "--lora.export", "adapter"])
    assert config.adapter == dict(r=4, alpha=8.0, dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert (config.adapter_learning_rate, config.export_form) == (2e-4, "adapter")
    config = parse(PPOConfig, [*PPO, "--actor.lora.r", "4", "--critic.lora.learning_rate", "1e-3"])
    assert config.actor.lora == SteadyLoRAConfig(r=4) and config.critic.lora == SteadyLoRAConfig(learning_rate=1e-3)
    assert config.actor.adapter_learning_rate == 1e-6 and config.critic.adapter_learning_rate == 1e-3


def test_config_yaml_parses_back_to_the_same_config(tmp_path):
    config = tiny.ppo_config(
        tmp_path, actor__lora=SteadyLoRAConfig(target_modules=["q_proj"]), actor__quantization="nf4"
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_dict(config)))
    again = parse(PPOConfig, ["--config", str(path)])
    assert as_dict(again) == as_dict(config) and again.actor == config.actor


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora.r", "-1"], "lora.r=-1"),
        (["--lora.alpha", "0"], "lora.alpha=0"),
        (["--lora.dropout", "1"], "lora.dropout=1"),
        (["--lora.learning_rate", "-1"], "lora.learning_rate=-1"),
        (["--lora.target_modules", "[]"], "lora.target_modules is empty"),
        (["--lora.rank", "8"], "rank"),
        (["--lora.export", "both"], "both"),
        (["--model.quantization", "int8"], "int8"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(flags, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        parse(SFTConfig, [*SFT, *flags])


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_ppo_refuses_dropout(role):
    with pytest.raises(ValueError, match=r"^lora\.dropout=0\.1: PPO compares .* Set it to 0\.$"):
        parse(PPOConfig, [*PPO, f"--{role}.lora.dropout", "0.1"])


@pytest.mark.parametrize(
    ("config_class", "flags", "role", "lora"),
    [
        (SFTConfig, SFT, "model", "lora.r"),
        (DPOConfig, SFT, "model", "lora.r"),
        (PPOConfig, PPO, "actor", "actor.lora.r"),
        (PPOConfig, PPO, "critic", "critic.lora.r"),
    ],
)
def test_weights_of_4_bits_are_not_trained(config_class, flags, role, lora):
    with pytest.raises(ValueError, match=rf"{role}\.quantization=nf4: .* --{lora} 8"):
        parse(config_class, [*flags, f"--{role}.quantization", "nf4"])
    assert getattr(parse(config_class, [*flags, f"--{role}.quantization", "nf4", f"--{lora}", "8"]), role)


@pytest.mark.parametrize("setting", [("zero_stage", "3"), ("quantization", "nf4"), ("ds_config", "setup.py")])
@pytest.mark.parametrize(
    ("config_class", "flags"), [(PPOConfig, [*PPO, "--actor.lora.r", "8"]), (DPOConfig, [*SFT, "--lora.r", "8"])]
)
def test_settings_of_a_ref_that_is_not_built_are_refused(config_class, flags, setting):
    name, value = setting
    with pytest.raises(ValueError, match=rf"ref\.{name} does nothing: .*--ref\.model_name_or_path"):
        parse(config_class, [*flags, f"--ref.{name}", value])
    if name != "ds_config":
        parse(config_class, [*flags, f"--ref.{name}", value, "--ref.model_name_or_path", "m"])


def test_the_ref_is_the_trained_model_where_no_other_is_named():
    assert parse(PPOConfig, [*PPO, "--actor.lora.r", "8"]).ref_is_the_actor
    assert not parse(PPOConfig, [*PPO, "--critic.lora.r", "8"]).ref_is_the_actor
    assert not parse(PPOConfig, [*PPO, "--actor.lora.r", "8", "--ref.model_name_or_path", "m"]).ref_is_the_actor
    dpo = parse(DPOConfig, [*SFT, "--lora.r", "8", "--model.quantization", "nf4"])
    assert dpo.ref_is_the_model
    assert not replace(dpo, ref_logprobs="precomputed").ref_is_the_model, "it is asked before there is a model"


def test_a_ref_that_is_the_models_start_has_its_bits():
    dpo = parse(DPOConfig, [*SFT, "--lora.r", "8", "--model.quantization", "nf4", "--ref_logprobs", "precomputed"])
    assert dpo.ref_quantization == "nf4"
    named = parse(DPOConfig, [*SFT, "--ref.model_name_or_path", "other", "--lora", "{}", "--model.quantization", "nf4"])
    assert named.ref_quantization is None and named.lora == LoRAConfig()
