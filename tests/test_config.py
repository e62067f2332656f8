"""config.py and ds_configs/: what a command line may say, what is refused with which advice, what is written back."""

import json
import re
from dataclasses import is_dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import tiny
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

import engine.config
from engine.answering.settings import AnsweringConfig
from engine.config import (
    CriticConfig,
    DataConfig,
    DPOConfig,
    FrozenRoleConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    SFTConfig,
    SteadyLoRAConfig,
    TrackingConfig,
    TrainedRoleConfig,
    as_dict,
    parse,
    resolved_dtype,
    run,
)
from engine.distributed.zero_config import frozen_config, training_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
OF_GROUPS = {  # what stands over a group whose setting is not explained
    group.__doc__.splitlines()[0].rstrip(".") for group in vars(engine.config).values() if is_dataclass(group)
}
DS_FILES = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPE = """
actor: {model_name_or_path: some/actor, learning_rate: 1e-4}
reward: {model_name_or_path: some/reward}
data: {train: prompts.jsonl}
rollout: {temperature: 0.7}
rollout_batch_size: 64
seed: 3
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return ["--config", str(path), "--output_dir", "out"]


def config(**changes) -> PPOConfig:
    given = dict(
        actor=TrainedRoleConfig(model_name_or_path="some/actor"),
        reward=RewardConfig(model_name_or_path="some/reward"),
        data=DataConfig(train="prompts.jsonl"),
        output_dir="out",
    )
    return PPOConfig(**given | changes)


def suggested(error) -> list[str]:
    """The command-line words after `Try`."""
    return re.search(r"Try (--.*)\.", str(error.value)).group(1).split()


# parse


def test_a_recipe_and_later_overrides_win_over_the_defaults(recipe):
    parsed = parse(PPOConfig, [*recipe, "--actor.zero_stage", "3", "--seed", "5", "--rollout.top_k", "7"])
    assert parsed.actor == TrainedRoleConfig(model_name_or_path="some/actor", learning_rate=1e-4, zero_stage=3)
    assert parsed.rollout == RolloutConfig(temperature=0.7, top_k=7)
    assert (parsed.seed, parsed.rollout_batch_size, parsed.minibatch_size) == (5, 64, 32)
    assert parsed.critic == CriticConfig(learning_rate=5e-6)
    assert parsed.output_dir == "out"


@pytest.mark.parametrize(
    "typo",
    [
        ["--actor.zero_stages", "3"],
        ["--actor.zero_stag", "3"],  # a prefix of a real name
        ["--rollout_batch", "64"],
        ["--zero", "2"],
        ["--kl", "0.1"],
        ["--rollout.temp", "0.5"],
    ],
)
def test_an_unknown_name_is_refused_by_name(recipe, typo):
    with pytest.raises(ValueError, match=re.escape(typo[0].lstrip("-").split(".")[-1])):
        parse(PPOConfig, recipe + typo)


@pytest.mark.parametrize("line", ["zero_stag: 3", "seeds: 1", "actor.learning_rat: 1.0"])
def test_an_unknown_name_in_a_recipe_is_refused_by_name(tmp_path, line):
    path = tmp_path / "typo.yaml"
    path.write_text(RECIPE + line + "\n")
    with pytest.raises(ValueError, match=line.split(":")[0].split(".")[-1]):
        parse(PPOConfig, ["--config", str(path), "--output_dir", "out"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", "abc", "a whole number"),
        ("rollout_batch_size", "3.5", "a whole number"),
        ("num_iterations", "ten", "a whole number"),  # or nothing: jsonargparse lists both
        ("actor.learning_rate", "fast", "a number"),
        ("zero_stage", "4", "one of 0, 1, 2, 3, 'auto'"),
        ("dtype", "float8", "one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("kl_estimator", "k4", "one of 'full', 'k1', 'k2', 'k3'"),
        ("actor.gradient_checkpointing", "perhaps", "true or false"),
        ("actor.lora.r", "eight", "a whole number"),  # of a group that may be left out
        ("actor.lora.target_modules", "q_proj", "a list, as in [one, two]"),
        ("actor.lora", "8", "a group of settings, which are set one by one"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_a_sentence(recipe, name, value, said):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{name}={value} is not {said}.')}\nSee --help"):
        parse(PPOConfig, [*recipe, f"--{name}", value])


@pytest.mark.parametrize("config_class", [AnsweringConfig, SFTConfig, RewardModelConfig, DPOConfig, PPOConfig])
def test_help_explains_every_setting(capsys, config_class):
    """A group in its heading, and those that may be left out in a help of their own."""

    def explained(flag: str) -> dict[str, list[str]]:
        with pytest.raises(SystemExit):
            parse(config_class, [flag])
        shown = capsys.readouterr().out
        assert "<class" not in shown
        option = r"^  --([a-z_0-9.]+)(?:, \S+)? (?:\{.*?\}|[A-Z_0-9]+|\[.*?\])?(.*?)(?=^  -|^\S|\Z)"
        found = dict(re.findall(option, shown, re.MULTILINE | re.DOTALL))
        groups = re.findall(r"^(\S.*):\n  --(\w+) CONFIG ", shown, re.MULTILINE)
        given = {name: re.split(r"\((?:required, )?type: ", text)[0].split() for name, text in found.items()}
        return given | {name: [] if heading in OF_GROUPS else heading.split() for heading, name in groups}

    about = explained("--help")
    assert set(config_class.__dataclass_fields__) <= {name.split(".")[0] for name in about}
    for name in [name for name in about if name.endswith(".help")]:
        about |= explained(f"--{name}")
    assert not [name for name, words in about.items() if len(words) < 3]


def test_a_misspelt_setting_of_a_group_that_may_be_left_out_is_named(recipe):
    with pytest.raises(ValueError, match=r"^actor\.lora\.rank is not a setting\.\n"):
        parse(PPOConfig, [*recipe, "--actor.lora.rank", "8"])


def test_a_guard_that_guards_nothing_is_refused(recipe):
    with pytest.raises(ValueError, match=r"kl_guard\.roll_backs=2 does nothing without kl_guard\.max_kl"):
        parse(PPOConfig, [*recipe, "--kl_guard.roll_backs", "2"])


def test_what_a_group_needs_is_named_with_the_group(recipe):
    with pytest.raises(ValueError, match=r"^pretraining\.data\.train is not set\.\n"):
        parse(PPOConfig, [*recipe, "--pretraining.coef", "1"])


def test_a_missing_recipe_is_a_readable_error():
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        parse(PPOConfig, ["--config", "nowhere.yaml", "--output_dir", "out"])


def test_the_launchers_own_argument_is_not_a_setting(recipe):
    assert parse(PPOConfig, [*recipe, "--local_rank", "1"]) == parse(PPOConfig, recipe)


# What is written down starts the same run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(
            seed=7,
            zero_stage=3,
            kl_coef=1e-7,
            num_iterations=4,
            actor=TrainedRoleConfig(model_name_or_path="random://llama?a=1&b=2", learning_rate=3e-7, ds_config=None),
            ref=FrozenRoleConfig(zero_stage=0),
            tracking=TrackingConfig(wandb="disabled", run_name="ja: nein"),
        ),
        dict(
            reward=RewardConfig(function="mine:score"), rollout=RolloutConfig(micro_batch_size=3, samples_per_prompt=2)
        ),
    ],
)
def test_config_yaml_parses_back_to_the_same_config(tmp_path, changes):
    written = config(**changes)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_dict(written), sort_keys=False))
    assert parse(PPOConfig, ["--config", str(path)]) == written


STAGES = {"sft": (SFTConfig, "model"), "reward": (RewardModelConfig, "reward"), "dpo": (DPOConfig, "model")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_in_the_checkout_parses(path):
    config_class, role = STAGES.get(path.stem.split("_")[-1], (PPOConfig, "actor"))
    parsed = parse(config_class, ["--config", str(path), "--output_dir", "out"])
    written = yaml.safe_load(path.read_text())
    assert getattr(parsed, role).model_name_or_path == written[role]["model_name_or_path"]
    assert parsed.output_dir == "out"
    parsed.check_world_size(1)
    parsed.check_world_size(2)


def test_there_are_recipes_and_ds_configs():
    assert RECIPES and len(DS_FILES) >= 4


# Values that cannot work


def test_scores_come_from_somewhere():
    with pytest.raises(ValueError, match=r"reward\.model_name_or_path.*reward\.function.*reward\.url"):
        RewardConfig()
    RewardConfig(model_name_or_path="some/reward", function="mine:score", url="http://localhost:1/scores")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(url="localhost:8000"), "http://"),
        (dict(retries=-1), r"reward\.retries"),
        (dict(timeout_s=0), r"reward\.timeout_s"),
        (dict(clip=0), r"reward\.clip"),
        (dict(overlong_penalty=1.0), "go together"),
        (dict(overlong_tokens=8), "go together"),
    ],
)
def test_settings_of_scores_that_cannot_work(given, said):
    with pytest.raises(ValueError, match=said):
        RewardConfig(function="mine:score", **given)


def test_a_penalty_for_more_tokens_than_there_can_be_is_refused():
    reward = RewardConfig(function="mine:score", overlong_penalty=1.0, overlong_tokens=999)
    with pytest.raises(ValueError, match=r"reward\.overlong_tokens=999"):
        config(reward=reward)


@pytest.mark.parametrize("spec", ["mine", "mine.score", "a:b:c"])
def test_a_score_function_is_module_and_function(spec):
    with pytest.raises(ValueError, match="module:function"):
        RewardConfig(function=spec)


def test_sharding_of_a_score_function_is_refused():
    with pytest.raises(ValueError, match=r"reward\.zero_stage"):
        config(reward=RewardConfig(function="mine:score", zero_stage=3))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: config(actor=TrainedRoleConfig()), "actor.model_name_or_path"),
        (lambda: config(minibatch_size=0), "minibatch_size"),
        (lambda: config(ppo_epochs=0), "ppo_epochs"),
        (lambda: config(num_iterations=0), "num_iterations"),
        (lambda: config(kl_coef=-0.1), "kl_coef"),
        (lambda: config(kl_coef=float("nan")), "kl_coef"),
        (lambda: config(clip_range=-1.0), "clip_range"),
        (lambda: RolloutConfig(temperature=0.0), "rollout.temperature"),
        (lambda: RolloutConfig(temperature=float("nan")), "rollout.temperature"),
        (lambda: RolloutConfig(top_p=0.0), "rollout.top_p"),
        (lambda: RolloutConfig(top_p=1.1), "rollout.top_p"),
        (lambda: RolloutConfig(top_k=-1), "rollout.top_k"),
        (lambda: RolloutConfig(max_response_tokens=0), "rollout.max_response_tokens"),
        (lambda: RolloutConfig(max_response_tokens=4, min_response_tokens=5), "rollout.min_response_tokens"),
        (lambda: RolloutConfig(micro_batch_size=0), "rollout.micro_batch_size"),
        (lambda: RolloutConfig(environment="mine"), "rollout.environment='mine' is not of the form module:class"),
        (lambda: RolloutConfig(environment="mine:Game", max_turns=0), "rollout.max_turns"),
        (lambda: RolloutConfig(max_turns=2), "rollout.max_turns=2 does nothing without an environment"),
        (lambda: DataConfig(train="x", max_prompt_tokens=0), "data.max_prompt_tokens"),
        (lambda: DataConfig(train="x", max_samples=0), "data.max_samples"),
        (lambda: TrainedRoleConfig(learning_rate=-1.0), "learning_rate"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        build()


def test_minibatches_that_do_not_divide_the_rollout_are_refused_with_a_size_that_works():
    with pytest.raises(ValueError, match="rollout_batch_size=100 is not a multiple of minibatch_size=32") as error:
        config(rollout_batch_size=100, minibatch_size=32)
    assert suggested(error) == ["--rollout_batch_size", "128"]
    assert config(rollout_batch_size=128, minibatch_size=32).steps_per_iteration == 4


@pytest.mark.parametrize(
    ("rollout", "minibatch", "samples"), [(10, 4, 1), (10, 4, 5), (100, 32, 3), (8, 8, 3), (16, 4, 6), (30, 20, 30)]
)
def test_the_suggested_rollout_batch_size_really_works(rollout, minibatch, samples):
    sizes = dict(minibatch_size=minibatch, micro_batch_size=1, rollout=RolloutConfig(samples_per_prompt=samples))
    with pytest.raises(ValueError, match="is not a multiple of") as error:
        config(rollout_batch_size=rollout, **sizes)
    flag, value = suggested(error)
    assert flag == "--rollout_batch_size"
    assert config(rollout_batch_size=int(value), **sizes).rollout_batch_size >= rollout


@pytest.mark.parametrize(
    ("minibatch", "micro", "world"), [(30, 2, 4), (32, 3, 1), (32, 4, 3), (4, 4, 2), (20, 8, 1), (24, 16, 2)]
)
def test_the_suggested_minibatch_size_really_works(minibatch, micro, world):
    refused = config(rollout_batch_size=minibatch * 2, minibatch_size=minibatch, micro_batch_size=micro)
    with pytest.raises(ValueError, match=f"{micro} x {world} = {micro * world}") as error:
        refused.check_world_size(world)
    words = suggested(error)  # one flag, or several that work together
    values = {flag[2:]: int(value) for flag, value in zip(words[::2], words[1::2], strict=True)}
    replace(refused, **values).check_world_size(world)


def test_sizes_that_divide_are_accepted_and_only_those():
    for minibatch, micro, world in product((4, 6, 12, 24), (1, 2, 3, 4), (1, 2, 3)):
        run = config(rollout_batch_size=24, minibatch_size=minibatch, micro_batch_size=micro)
        if minibatch in range(0, 25, micro * world):
            run.check_world_size(world)
        else:
            with pytest.raises(ValueError, match="minibatch_size"):
                run.check_world_size(world)


def test_derived_sizes():
    run = config(
        rollout_batch_size=24,
        minibatch_size=12,
        micro_batch_size=3,
        ppo_epochs=5,
        data=DataConfig(train="x", max_prompt_tokens=10),
        rollout=RolloutConfig(max_response_tokens=7, samples_per_prompt=4),
    )
    assert run.prompts_per_iteration == 6
    assert run.steps_per_iteration == 10
    assert run.micro_batch_tokens == 51
    assert run.rollout_micro_batch_size == 24
    assert replace(run, rollout=RolloutConfig(micro_batch_size=2)).rollout_micro_batch_size == 2


def test_a_pass_that_is_needed_all_the_same_is_not_saved():
    drawn = dict(rollout=RolloutConfig(logprobs="drawn"))
    trunk = dict(shared_trunk=True, actor=TrainedRoleConfig(model_name_or_path="a", lora=SteadyLoRAConfig(r=2)))
    for saved in ({}, trunk, dict(trunk, advantage_estimator="reinforce_plus_plus")):
        config(**drawn, **saved)
    with pytest.raises(ValueError, match=r"rollout\.logprobs=drawn saves a forward pass .* leave it out"):
        config(**drawn, kl_estimator="full")


def test_dtype_auto_follows_the_device():
    assert resolved_dtype("auto", on_gpu=True) == "bfloat16"
    assert resolved_dtype("auto", on_gpu=False) == "float32"
    assert resolved_dtype("float16", on_gpu=True) == "float16"
    with pytest.raises(ValueError, match="dtype=float16 needs a GPU"):
        resolved_dtype("float16", on_gpu=False)


# Which model and which sharding a role gets


def test_models_of_roles_that_name_none():
    run = config()
    assert [run.model_of(role) for role in ("actor", "critic", "ref", "reward")] == [
        "some/actor",
        "some/reward",
        "some/actor",
        "some/reward",
    ]
    run = config(reward=RewardConfig(function="mine:score"))
    assert (run.model_of("critic"), run.model_of("reward")) == ("some/actor", None)
    run = config(
        critic=TrainedRoleConfig(model_name_or_path="a/critic"), ref=FrozenRoleConfig(model_name_or_path="a/ref")
    )
    assert (run.model_of("critic"), run.model_of("ref")) == ("a/critic", "a/ref")


def test_the_roles_own_sharding_wins_over_the_runs(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    run = config(
        zero_stage=1,
        actor=TrainedRoleConfig(model_name_or_path="a", zero_stage=3),
        ref=FrozenRoleConfig(ds_config=str(file)),
    )
    assert run.ds_config_of("actor") == ROOT / "ds_configs" / "zero3.json"
    assert run.ds_config_of("critic") == ROOT / "ds_configs" / "zero1.json"
    assert run.ds_config_of("ref") == file
    assert config().ds_config_of("actor") == ROOT / "ds_configs" / "zero2.json"
    assert config(ds_config=str(file)).ds_config_of("reward") == file
    stage0 = config(zero_stage=3, critic=TrainedRoleConfig(zero_stage=0))
    assert stage0.ds_config_of("critic") == ROOT / "ds_configs" / "zero0.json"


def test_a_stage_and_a_file_together_are_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"Set zero_stage or ds_config, not both"):
        config(zero_stage=2, ds_config=str(file))
    with pytest.raises(ValueError, match=r"Set critic\.zero_stage or critic\.ds_config"):
        config(critic=TrainedRoleConfig(zero_stage=2, ds_config=str(file)))
    # One from the role and one from the run is no clash: the role's wins.
    assert config(zero_stage=2, ref=FrozenRoleConfig(ds_config=str(file))).ds_config_of("ref") == file


def test_a_missing_ds_config_is_refused_by_name():
    with pytest.raises(ValueError, match=r"actor\.ds_config=nowhere\.json"):
        config(actor=TrainedRoleConfig(model_name_or_path="a", ds_config="nowhere.json"))


# DeepSpeed's files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("path", DS_FILES, ids=lambda path: path.name)
def test_every_ds_config_is_accepted_for_trained_and_frozen_roles(path, dtype):
    trained, frozen = training_config(path, dtype=dtype, max_grad_norm=0.5), frozen_config(path, dtype=dtype)
    stage = int(re.search(r"zero(\d)", path.name).group(1))
    trained_zero = DeepSpeedZeroConfig(**trained["zero_optimization"])
    frozen_zero = DeepSpeedZeroConfig(**frozen["zero_optimization"])
    assert trained_zero.stage == (1 if stage == 0 and dtype != "float32" else stage)
    assert frozen_zero.stage == (3 if stage == 3 else 0)
    assert frozen_zero.offload_optimizer is None
    assert trained["gradient_clipping"] == 0.5 and "gradient_clipping" not in frozen
    for made in (trained, frozen):
        assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
        assert ("bf16" in made, "fp16" in made) == (dtype == "bfloat16", dtype == "float16")


def test_bf16_gradients_are_checked_for_overflow():
    made = training_config(DS_FILES[0], dtype="bfloat16", max_grad_norm=1.0)
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train_batch_size": 8}', "train_batch_size"),
        ('{"bf16": {"enabled": true}}', "bf16"),
        ('{"zero_optimisation": {"stage": 3}}', "zero_optimisation"),
        ('{"zero_optimization": {"stage": 3, "stage3_max_live_params": 0}}', "stage3_max_live_params"),
        ('{"zero_optimization": ', "not valid JSON"),
    ],
)
def test_a_ds_config_with_a_foreign_or_misspelt_key_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)
    for make in (
        lambda: training_config(path, dtype="float32", max_grad_norm=1.0),
        lambda: frozen_config(path, dtype="float32"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            make()
        assert "mine.json" in str(error.value)


@pytest.mark.parametrize("wrong", [dict(kl_target=0.0), dict(kl_horizon=0.0)])
def test_an_adaptive_kl_controller_needs_a_target_and_a_horizon(wrong):
    with pytest.raises(ValueError, match="needs kl_target"):
        config(kl_controller="ziegler", **wrong)
    assert config(kl_controller="fixed", **wrong).kl_controller == "fixed"


# What a launch script says


def test_a_near_name_is_suggested(recipe):
    with pytest.raises(ValueError, match=r"learning_rat 1e-3\. Did you mean --actor\.learning_rate"):
        parse(PPOConfig, [*recipe, "--output_dir", "out", "--actor.learning_rat", "1e-3"])


def test_a_mistake_of_the_users_is_a_message():
    with pytest.raises(SystemExit) as ended:
        run(lambda: config(minibatch_size=0))
    assert ended.value.code == "ValueError: minibatch_size=0 must be at least 1."


def test_a_mistake_of_ours_keeps_its_traceback():
    """A ValueError from inside a library is a bug until the engine has said what it means."""
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda: json.loads("1", parse_int=lambda text: int("x")))


def test_sizes_that_work_are_suggested_at_once():
    with pytest.raises(ValueError, match=r"Try --minibatch_size 8\.$"):
        config(rollout_batch_size=8, minibatch_size=6, micro_batch_size=4)


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [
        ("", "gamma", 10),
        ("", "lam", -0.1),
        ("actor", "adam_beta2", 1.0),
        ("actor", "adam_epsilon", 0.0),
        ("actor", "weight_decay", -3),
    ],
)
def test_numbers_outside_their_range(role, field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must"):
        TrainedRoleConfig(**{field: value}) if role else config(**{field: value})


def test_the_critics_learning_rate_is_its_own_in_python_too():
    assert config(critic=CriticConfig(zero_stage=3)).critic.learning_rate == 5e-6


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({}, {}),
        (dict(lam=0.9, gamma=0.9, value_coef=0.5, critic__learning_rate=1e-5), {}),
        (
            dict(advantage_estimator="rloo", lam=0.9, gamma=0.9, value_coef=0.5, critic__learning_rate=1e-5),
            dict.fromkeys(("lam", "gamma", "value_coef", "critic"), "advantage_estimator=rloo"),
        ),
        (
            dict(advantage_estimator="reinforce_plus_plus_baseline", gamma=0.9, value_label="monte_carlo"),
            {"value_label": "advantage_estimator=reinforce_plus_plus_baseline"},
        ),
        (dict(target_kl=0.1, ppo_epochs=1), {"target_kl": "ppo_epochs=1"}),
        (dict(target_kl=0.1, ppo_epochs=2), {}),
        (dict(policy_loss="penalty", clip_range=0.1, penalty_coef=0.5), {"clip_range": "policy_loss=penalty"}),
        (dict(penalty_target=0.5), {"penalty_target": "policy_loss=clip"}),
        (dict(kl_controller="schulman", kl_target=3.0, kl_horizon=50.0), {"kl_horizon": "kl_controller=schulman"}),
        (dict(kl_target=3.0), {"kl_target": "kl_controller=fixed"}),
        (
            dict(importance_cap=2.0, rollout__logprobs="drawn"),
            {"importance_cap": "rollout.logprobs=drawn, and no filter"},
        ),
        (dict(importance_cap=2.0, rollout__logprobs="drawn", rollout__top_p=0.9), {}),
        (dict(importance_cap=2.0), {}),
    ],
)
def test_what_nothing_looks_at_is_told(tmp_path, given, idle):
    config = tiny.ppo_config(tmp_path, **dict(critic__learning_rate=5e-6, rollout__samples_per_prompt=2) | given)
    assert config.without_effect == idle
