"""`--preset`: each reproduces its column of the table of defaults, and recipe and flags win over it."""

import copy

import pytest
import yaml

from engine.config import PPOConfig, SFTConfig, SteadyLoRAConfig, as_dict, parse
from engine.config.presets import PRESETS

PPO = ["--actor.model_name_or_path", "m", "--reward.model_name_or_path", "r", "--data.train", "d", "--output_dir", "o"]

# The defaults of the others, row by row as they are published, and ours. What an engine does per rank or per
# micro-batch is here what ours does over all ranks: whitening of TRL, loss means of DeepSpeed-Chat and TRL.
COLUMNS = ("deepspeed-chat", "trl", "openrlhf", None)
TABLE = [
    ("kl_coef", 0.1, 0.05, 0.01, 0.05),
    ("kl_estimator", "k1", "k1", "k1", "k1"),
    ("kl_controller", "fixed", "fixed", "fixed", "fixed"),
    ("reward.clip", 5.0, None, 10.0, None),
    ("gamma", 1.0, 1.0, 1.0, 1.0),
    ("lam", 0.95, 0.95, 1.0, 0.95),
    ("clip_range", 0.2, 0.2, 0.2, 0.2),
    ("value_clip_range", 0.2, 0.2, 0.5, 0.2),
    ("advantage_whitening", "none", "global", "global", "auto"),
    ("ppo_epochs", 1, 4, 1, 1),
    ("actor.learning_rate", 9.65e-6, 3e-6, 1e-6, 1e-6),
    ("critic.learning_rate", 5e-6, 3e-6, 9e-6, 5e-6),
    ("loss_mean", "tokens", "tokens", "tokens", "tokens"),
]
LITERATURE = [
    ("shared_trunk", True),
    ("value_coef", 0.1),
    ("kl_coef", 0.2),
    ("kl_controller", "ziegler"),
    ("kl_target", 6.0),
    ("kl_horizon", 10_000.0),
    ("kl_estimator", "full"),
    ("gamma", 1.0),
    ("lam", 0.95),
    ("clip_range", 0.2),
    ("value_clip_range", 0.2),
    ("ppo_epochs", 3),
    ("rollout_batch_size", 2),
    ("minibatch_size", 1),
    ("micro_batch_size", 1),
    ("rollout.temperature", 1.0),
    ("rollout.top_p", 1.0),
    ("rollout.top_k", 0),
    ("rollout.max_response_tokens", 32),
    ("actor.lora.r", 8),
    ("actor.lora.alpha", 16.0),
    ("actor.lora.dropout", 0.0),  # 0.05 there, which PPO refuses
    ("actor.lora.target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ("actor.quantization", "nf4"),
]
CELLS = [
    *((preset, name, cells[column]) for name, *cells in TABLE for column, preset in enumerate(COLUMNS)),
    *(("literature", name, cell) for name, cell in LITERATURE),
]


def parsed(*flags: str, preset: str | None) -> PPOConfig:
    return parse(PPOConfig, [*PPO, *(["--preset", preset] if preset else []), *flags])


def setting(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def recipe(tmp_path):
    """`recipe(**settings)` -> the flags of a recipe that holds them."""

    def write(**settings) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize(("preset", "name", "cell"), CELLS)
def test_a_preset_is_its_column_of_the_table(preset, name, cell):
    assert setting(parsed(preset=preset), name) == cell


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_every_cell_itself_and_changes_nothing_else(preset):
    """So that a new default of ours moves no preset."""
    cells = {name: cell for of, name, cell in CELLS if of == preset}
    flat = {}
    for name, value in PRESETS[preset].items():
        flat |= {f"{name}.{inner}": cell for inner, cell in value.items()} if isinstance(value, dict) else {name: value}
    assert flat == {name: cell for name, cell in cells.items() if name != "actor.lora.dropout"}
    written, plain = as_dict(parsed(preset=preset)), as_dict(parsed(preset=None))
    if plain["actor"]["lora"] is None and written["actor"]["lora"] is not None:
        plain["actor"]["lora"] = as_dict(SteadyLoRAConfig())
    for name in cells:
        *groups, last = name.split(".")
        at = plain
        for group in groups:
            at = at[group]
        at[last] = cells[name]
    assert written == plain


def test_the_four_are_there():
    assert set(PRESETS) == {"literature", "deepspeed-chat", "trl", "openrlhf"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_on_one_rank(preset):
    parsed(preset=preset).check_world_size(1)


def test_the_literatures_minibatch_is_for_one_rank():
    with pytest.raises(ValueError, match=r"minibatch_size=1 is not .* 1 x 2 = 2\. Try --minibatch_size 2\."):
        parsed(preset="literature").check_world_size(2)
    parsed("--minibatch_size", "2", preset="literature").check_world_size(2)


def test_a_recipe_wins_over_the_preset_and_a_flag_over_both(recipe):
    changes = recipe(kl_coef=0.3, ppo_epochs=7, actor={"learning_rate": 1e-4}, reward={"clip": 3.0})
    config = parsed(*changes, "--ppo_epochs", "9", "--critic.learning_rate", "2e-5", preset="deepspeed-chat")
    assert (config.kl_coef, config.actor.learning_rate, config.reward.clip) == (0.3, 1e-4, 3.0)
    assert (config.ppo_epochs, config.critic.learning_rate) == (9, 2e-5)
    assert config.advantage_whitening == "none"  # the preset's, which neither of them names


def test_it_does_not_matter_where_on_the_line_the_preset_stands(recipe):
    changes = [*PPO, *recipe(kl_coef=0.3), "--ppo_epochs", "9"]
    first, last = ["--preset", "trl", *changes], [*changes, "--preset=trl"]
    assert parse(PPOConfig, first) == parse(PPOConfig, last)
    assert (parse(PPOConfig, last).kl_coef, parse(PPOConfig, last).actor.learning_rate) == (0.3, 3e-6)


def test_a_recipe_and_flags_change_the_presets_adapter_in_part(recipe):
    changed = parsed(*recipe(actor={"lora": {"r": 4}}), "--actor.lora.alpha", "2", preset="literature").actor
    assert (changed.lora.r, changed.lora.alpha, len(changed.lora.target_modules)) == (4, 2.0, 7)
    flags = ["--shared_trunk", "false", "--actor.lora.r", "0", "--actor.quantization", "null"]
    without = parsed(*flags, preset="literature").actor
    assert not without.has_adapter and without.quantization is None


def test_an_empty_value_takes_the_presets_back():
    assert parsed("--reward.clip", "null", preset="openrlhf").reward.clip is None


def test_a_recipe_may_name_the_preset_and_a_flag_another(recipe):
    named = recipe(preset="openrlhf", kl_coef=0.3)
    config = parsed(*named, preset=None)
    assert (config.kl_coef, config.lam, config.value_clip_range) == (0.3, 1.0, 0.5)
    config = parsed(*named, preset="deepspeed-chat")
    assert (config.kl_coef, config.lam, config.reward.clip) == (0.3, 0.95, 5.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_config_yaml_starts_the_same_run_without_the_preset(preset, recipe):
    config = parsed("--seed", "3", preset=preset)
    written = as_dict(config)
    assert "preset" not in written
    assert parse(PPOConfig, recipe(**written)) == config


@pytest.mark.parametrize("name", ["verl", "Literature", "lit"])
def test_an_unknown_preset_is_refused_with_the_four(name, recipe):
    said = f"preset={name} is not one of literature, deepspeed-chat, trl, openrlhf"
    with pytest.raises(ValueError, match=said):
        parsed(preset=name)
    with pytest.raises(ValueError, match=said):
        parsed(*recipe(preset=name), preset=None)


def test_a_preset_without_a_name_is_refused():
    with pytest.raises(ValueError, match="preset"):
        parse(PPOConfig, [*PPO, "--preset"])


@pytest.mark.parametrize("typo", [["--pre", "trl"], ["--presets", "trl"]])
def test_a_misspelt_preset_flag_is_refused(typo):
    with pytest.raises(ValueError, match=typo[0]):
        parse(PPOConfig, [*PPO, *typo])


def test_the_other_stages_have_no_preset(recipe):
    sft = ["--model.model_name_or_path", "m", "--data.train", "d.jsonl", "--output_dir", "out"]
    with pytest.raises(ValueError, match="--preset"):
        parse(SFTConfig, [*sft, "--preset", "trl"])
    with pytest.raises(ValueError, match="preset"):
        parse(SFTConfig, [*recipe(preset="trl"), *sft])


def test_a_preset_leaves_no_trace():
    """Neither in the table nor in a run without one."""
    before, plain = copy.deepcopy(PRESETS), parsed(preset=None)
    parsed("--actor.lora.r", "4", "--actor.lora.target_modules", "[q_proj]", preset="literature")
    assert parsed(preset=None) == plain and before == PRESETS
