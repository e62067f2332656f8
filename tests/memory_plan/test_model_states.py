"""Bytes of a model's states against the accounting of ZeRO (https://arxiv.org/abs/1910.02054), by hand."""

import dataclasses

import pytest
import tiny
import torch

from engine.config import DS_CONFIGS, SteadyLoRAConfig
from engine.memory_plan import Planner

ELEMENTS = 8_030_261_248  # of Llama 3.1 8B


@pytest.fixture
def actor(tmp_path):
    """`actor(dtype, **settings)` -> the planner of a run with Llama 3.1 8B, and its actor."""

    def made(dtype: str, **settings):
        models = dict(model="llama-3.1-8b", reward__model_name_or_path="llama-3.1-8b")
        planner = Planner.of(tiny.ppo_config(tmp_path, dtype=dtype, **models, **settings), device="cuda")
        return planner, planner.roles[0]

    return made


# (dtype, file, ranks) -> bytes per parameter of weights, gradients, optimizer states.
BY_HAND = {
    ("float32", "zero0", 8): (4, 4, 8),
    ("float32", "zero3", 8): (4 / 8, 4 / 8, 12 / 8),
    ("bfloat16", "zero0", 8): (2, 2, 12 / 8),  # runs as stage 1: the masters need an owner
    ("bfloat16", "zero1", 64): (2, 2, 12 / 64),
    ("bfloat16", "zero3", 64): (2 / 64, 2 / 64, 12 / 64),
    ("float16", "zero3_offload", 8): (0, 0, 0),
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_bytes_per_parameter(actor, case):
    dtype, file, ranks = case
    planner, role = actor(dtype)
    of = planner.states(role, DS_CONFIGS / f"{file}.json", world_size=ranks)
    found = (of.weights_bytes, of.gradients_bytes, of.optimizer_bytes)
    assert [size / ELEMENTS for size in found] == pytest.approx(BY_HAND[case], rel=1e-3)


def test_gradients_at_stage_2_are_those_of_weights_that_lie_partly_in_a_part(actor):
    planner, role = actor("bfloat16")
    of = planner.states(role, DS_CONFIGS / "zero2.json", world_size=8)
    largest = 128_256 * 4096
    assert 2 * ELEMENTS / 8 <= of.gradients_bytes <= 2 * (ELEMENTS / 8 + 2 * largest)


def test_what_is_offloaded_is_on_the_host(actor):
    """fp32 masters, two moments and a gradient; two bytes each of weights and gradients that add up."""
    planner, role = actor("bfloat16")
    of = planner.states(role, DS_CONFIGS / "zero3_offload.json", world_size=8)
    assert of.host_bytes / ELEMENTS == pytest.approx((12 + 4 + 2 + 2) / 8, rel=1e-3)


def test_four_bits_a_weight_and_an_adapter_to_train(actor):
    """All but the embedding, the head and the norms are packed."""
    lora = SteadyLoRAConfig(r=8, target_modules=["q_proj"])
    planner, role = actor("bfloat16", actor__lora=lora, actor__quantization="nf4")
    of = planner.states(role, DS_CONFIGS / "zero2.json", world_size=1)
    embeddings, adapter = 2 * 128_256 * 4096, 32 * 8 * (4096 + 4096)
    assert of.trained_parameters == adapter and of.parameters == ELEMENTS + adapter
    assert of.weights_bytes == pytest.approx(2 * embeddings + 0.516 * (ELEMENTS - embeddings), rel=0.01)


def test_weights_are_found_without_data_and_leave_random_numbers_alone(actor):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    _, role = actor("bfloat16")
    assert all(dataclasses.astuple(weight)[0] > 0 for weight in role.weights)
    assert torch.rand(1) == expected
