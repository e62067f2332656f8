"""What is recommended for models of 1.5, 8 and 70 billion weights, and what is said where nothing fits."""

import json
from functools import cache
from pathlib import Path

import pytest
import tiny

from engine.config import DS_CONFIGS, PPOConfig
from engine.memory_plan import Machine, Planner, as_table, recommendation
from engine.memory_plan.automatic import _settings
from engine.memory_plan.table import counted

GIB = 2**30
EIGHT_OF_80 = Machine(world_size=8, device_memory=80 * GIB)


def config_of(model: str, folder: Path, **overrides) -> PPOConfig:
    settings = dict(
        actor__gradient_checkpointing=True,
        critic__gradient_checkpointing=True,
        reward__model_name_or_path=model,
        dtype="bfloat16",
        data__max_prompt_tokens=512,
        rollout__max_response_tokens=1024,
        rollout_batch_size=256,
        minibatch_size=64,
        micro_batch_size=2,
    )
    return tiny.ppo_config(folder, model=model, **settings | overrides)


@pytest.fixture(scope="module")
def recommended(tmp_path_factory):
    """`recommended(model)` for 8 x 80 GiB, each found once."""
    folder = tmp_path_factory.mktemp("plans")
    return cache(lambda model: recommendation(Planner.of(config_of(model, folder), device="cuda"), EIGHT_OF_80))


def names(found) -> dict[str, str]:
    return {role: file.stem for role, file in found.sharding.items()}


def test_a_small_model_is_sharded_least(recommended):
    assert names(recommended("qwen2.5-1.5b")) == dict(actor="zero1", ref="zero0", critic="zero1", reward="zero0")


def test_8_billion_weights_are_sharded_more(recommended):
    found = recommended("llama-3.1-8b")
    assert names(found) == dict(actor="zero2", ref="zero3", critic="zero2", reward="zero3")
    assert found.plan.peak_bytes <= 0.9 * 80 * GIB
    assert any("actor: ZeRO 2, since ZeRO 1 would take" in reason for reason in found.reasons)


def test_70_billion_weights_are_offloaded_and_never_whole(recommended):
    found = recommended("llama-3.1-70b")
    assert "zero3_offload" in names(found).values() and found.rollout_weights == "sharded"
    assert set(names(found).values()) <= {"zero3", "zero3_offload"}
    assert any("--rollout.weights sharded" in reason for reason in found.reasons)


def test_where_nothing_fits_it_says_what_would_have_to_change(tmp_path):
    config = config_of("llama-3.1-8b", tmp_path)
    machine = Machine(world_size=1, device_memory=24 * GIB, host_memory=64 * GIB)
    found = recommendation(Planner.of(config, device="cuda"), machine)
    assert found.plan is None
    said = "\n".join(found.reasons)
    for expected in ("Nothing fits into 24.0 GiB on 1 rank.", "64 GiB", "half the tokens", "lora.r 16"):
        assert expected in said
    assert "such GPUs" in said


def test_fewer_rows_at_a_time_come_before_offloading(tmp_path):
    config = config_of("qwen2.5-1.5b", tmp_path, micro_batch_size=8, actor__gradient_checkpointing=False)
    planner, as_set = Planner.of(config, device="cuda"), 8
    found = recommendation(planner, Machine(world_size=8, device_memory=32 * GIB))
    assert found.sizes.micro_batch_size < as_set
    assert not any("offload" in name for name in names(found).values())
    assert any(f"Set --micro_batch_size {found.sizes.micro_batch_size} " in reason for reason in found.reasons)


def test_auto_sets_stages_of_roles_that_have_none_and_refuses_what_does_not_fit(tmp_path):
    config = tiny.ppo_config(tmp_path, zero_stage="auto", critic__zero_stage=3)
    chosen = _settings(config, Machine(world_size=2, device_memory=GIB), device="cpu")
    assert chosen == dict(
        actor={"zero_stage": 0}, ref={"zero_stage": 0}, reward={"zero_stage": 0}, rollout={"weights": "gathered"}
    )
    with pytest.raises(ValueError, match=r"(?s)zero_stage=auto finds no way.*Nothing fits"):
        _settings(config, Machine(world_size=2, device_memory=1000), device="cpu")


def test_auto_rather_offloads_than_changes_sizes(tmp_path):
    config = config_of("llama-3.1-8b", tmp_path, zero_stage="auto")
    chosen = _settings(config, Machine(world_size=8, device_memory=48 * GIB), device="cuda")
    assert chosen["critic"] == {"ds_config": str(DS_CONFIGS / "zero3_offload.json")}
    assert chosen["actor"] == {"zero_stage": 3} and chosen["rollout"] == {"weights": "gathered"}


def test_nothing_is_offloaded_from_a_cpu(tmp_path):
    config, machine = tiny.ppo_config(tmp_path, zero_stage="auto"), Machine(world_size=2, device_memory=1500 * 2**10)
    assert "ds_config" in _settings(config, machine, device="cuda")["actor"]
    with pytest.raises(ValueError, match="Nothing fits"):
        _settings(config, machine, device="cpu")


def test_with_adapters_a_ref_has_no_settings_of_its_own(tmp_path):
    planner = Planner.of(tiny.ppo_config(tmp_path, ref__zero_stage=3), device="cpu")
    said = "\n".join(recommendation(planner, Machine(world_size=1, device_memory=1000)).reasons)
    assert "--actor.lora.r 16 --critic.lora.r 16 without ref.zero_stage (LoRA)" in said


def test_parameters_are_counted_in_what_they_are_many_of():
    counts = {8_030_261_248: "8.03 B", 999_999_999: "1.00 B", 494_032_768: "494.03 M", 34_112: "34,112"}
    assert [counted(count) for count in counts] == list(counts.values())


def test_a_plan_is_readable_and_can_be_written(recommended):
    plan = recommended("llama-3.1-8b").plan
    table = as_table(plan)
    assert "actor   zero2     8.03 B      15.0 GiB" in table and "KV cache" in table
    assert "Peak on each of 8 ranks, in bfloat16: " in table
    written = json.loads(json.dumps(plan.as_dict()))
    assert written["roles"]["actor"]["parameters"] == 8_030_261_248
    assert set(written["phases"]) == {"load", "generate", "score", "train"}
    for phase in written["phases"].values():
        assert phase["peak_bytes"] == sum(phase["parts"].values()) <= written["peak_bytes"]
