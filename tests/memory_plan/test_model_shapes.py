"""Well-known models are known without their folders, in their true sizes."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from engine.memory_plan.model_shapes import fetch_config, known_models, model_config

# What the published checkpoints hold, tied weights once.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_its_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_bundled_file_is_checked_above():
    assert len(known_models()) == len(PARAMETERS)


def test_a_random_model_and_a_folder_say_their_own_sizes():
    assert model_config(tiny.LLAMA).hidden_size == 32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_was_downloaded_of_a_model_wins_over_what_is_known(cache):
    assert model_config("mine/Qwen2.5-0.5B").hidden_size == 896
    tiny.downloaded("mine/Qwen2.5-0.5B", cache)
    assert model_config("mine/Qwen2.5-0.5B").hidden_size == 32


def test_the_config_of_a_model_that_is_not_here_is_fetched(cache, monkeypatch):
    monkeypatch.setattr(
        "engine.models.loading.cached_file", lambda name, file: str(tiny.downloaded(name, cache) / file)
    )
    fetch_config("nobody/knows-7b")
    assert model_config("nobody/knows-7b").hidden_size == 32


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(ValueError, match=r"(?s)nobody/knows-7b are not known here.*llama-3.1-70b.*qwen2.5-0.5b"):
        model_config("nobody/knows-7b")
