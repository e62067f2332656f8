"""One model in four roles, compared with PEFT's own models of the same weights."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.models.adapter_folder import score_normalisation
from engine.models.loading import load_tokenizer
from engine.models.lora import REWARD_ADAPTER, adapter_off, adapter_on, is_adapter
from engine.models.random_init import local_name
from engine.models.shared_trunk import SharedTrunk, load_shared_trunk

FORM = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
MODELS = [tiny.LLAMA, tiny.GPT2, tiny.OPT]
IDS = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([3, 8, 9, 16])


def reward_adapter(model: str, folder: Path) -> str:
    """What PEFT writes of a reward model's adapter; scores of mean 3 and deviation 2."""
    return tiny.reward_adapter(model, folder)


def trunk(model: str, folder: Path, **given) -> SharedTrunk:
    torch.manual_seed(5)
    adapter = reward_adapter(model, folder)
    built = load_shared_trunk(
        model, **dict(dtype=torch.float32, adapter=FORM, reward_adapter=adapter, with_value_head=True, seed=0) | given
    ).eval()
    with torch.no_grad():  # as if trained
        for name, parameter in built.named_parameters():
            if ".lora_B.default." in name or name == "value_head.weight":
                parameter.normal_(std=0.1)
    return built


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_the_reward_adapter_scores_as_pefts_model_does(tmp_path, model):
    built = trunk(model, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(local_name(model), num_labels=1)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "reward_adapter").eval()
    hidden = theirs.base_model.model.base_model(IDS).last_hidden_state
    expected = (theirs.base_model.model.score(hidden).flatten()[POSITIONS] - 3.0) / 2.0
    with adapter_on(built.model, REWARD_ADAPTER):
        scores = built(IDS, POSITIONS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_without_adapters_it_is_its_base(tmp_path, model):
    built, base = trunk(model, tmp_path), AutoModelForCausalLM.from_pretrained(local_name(model)).eval()
    targets = IDS.flatten()[POSITIONS + 1]
    logprobs = base(IDS).logits.log_softmax(-1).flatten(0, 1)[POSITIONS].gather(-1, targets[:, None]).squeeze(-1)
    given = dict(temperature=1.0, chunk_tokens=3)
    with adapter_off(built.model):
        torch.testing.assert_close(built(IDS, POSITIONS, targets, **given).logprobs, logprobs, rtol=0, atol=1e-5)
    assert (built(IDS, POSITIONS, targets, **given).logprobs - logprobs).abs().max() > 1e-3, "it was trained"


@torch.no_grad()
def test_values_are_those_of_the_states_that_predict_the_tokens(tmp_path):
    built = trunk(tiny.LLAMA, tmp_path)
    said = built(IDS, POSITIONS, IDS.flatten()[POSITIONS + 1], temperature=1.0, chunk_tokens=3)
    states = built.model.base_model(IDS).last_hidden_state.flatten(0, 1)[POSITIONS]
    torch.testing.assert_close(said.values, states @ built.value_head.weight[0], rtol=0, atol=1e-5)
    assert said.values.std() > 1e-3


def test_it_begins_as_its_base_with_values_of_zero(tmp_path):
    adapter = reward_adapter(tiny.LLAMA, tmp_path)
    given = dict(dtype=torch.float32, adapter=FORM, reward_adapter=adapter, with_value_head=True, seed=0)
    built = load_shared_trunk(tiny.LLAMA, **given).eval()
    asked = (IDS, POSITIONS, IDS.flatten()[POSITIONS + 1])
    with torch.no_grad():
        on = built(*asked, temperature=1.0, chunk_tokens=3)
        with adapter_off(built.model):
            off = built(*asked, temperature=1.0, chunk_tokens=3)
    assert torch.equal(on.logprobs, off.logprobs) and on.values.abs().max() == 0


def test_one_adapter_and_the_value_head_are_trained_before_and_after_another_is_asked(tmp_path):
    built = trunk(tiny.LLAMA, tmp_path)

    def trained():
        return {name for name, parameter in built.named_parameters() if parameter.requires_grad}

    before = trained()
    assert "value_head.weight" in before
    assert all(name == "value_head.weight" or (is_adapter(name) and ".default." in name) for name in before)
    with adapter_on(built.model, REWARD_ADAPTER), torch.no_grad():
        built(IDS, POSITIONS)
    assert trained() == before
    with adapter_off(built.model):
        pass
    assert trained() == before


def test_the_base_is_in_memory_once(tmp_path):
    built, base = trunk(tiny.LLAMA, tmp_path), AutoModelForCausalLM.from_pretrained(local_name(tiny.LLAMA))
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    heads = sizes.pop("value_head.weight") + sizes.pop("reward_head.weight")
    assert sum(size for name, size in sizes.items() if not is_adapter(name)) == base.num_parameters()
    assert heads == 2 * 32


def test_what_is_no_reward_models_adapter_of_this_base_is_refused(tmp_path):
    given = dict(dtype=torch.float32, adapter=FORM, with_value_head=True, seed=0)
    with pytest.raises(ValueError, match=r"is no adapter.*lora\.export adapter"):
        load_shared_trunk(tiny.LLAMA, reward_adapter=local_name(tiny.score_head(tiny.LLAMA)), **given)
    adapter = reward_adapter(tiny.LLAMA, tmp_path)
    with pytest.raises(ValueError, match=r"is an adapter of .*, and the actor's model is"):
        load_shared_trunk(tiny.QWEN2, reward_adapter=adapter, **given)
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    (Path(adapter) / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": local_name(tiny.WIDE_LLAMA)})
    )
    with pytest.raises(ValueError, match="holds no score head of 64 weights"):
        load_shared_trunk(tiny.WIDE_LLAMA, reward_adapter=adapter, **given)
    language = get_peft_model(
        AutoModelForCausalLM.from_pretrained(local_name(tiny.LLAMA)), LoraConfig(r=4, target_modules=["q_proj"])
    )
    language.save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match="holds no score head"):
        load_shared_trunk(tiny.LLAMA, reward_adapter=str(tmp_path / "language"), **given)


def test_the_tokenizer_and_the_normalisation_lie_beside_the_adapter(tmp_path):
    adapter = reward_adapter(tiny.LLAMA, tmp_path)
    assert load_tokenizer(adapter, is_adapter=True).get_vocab() == load_tokenizer(tiny.LLAMA).get_vocab()
    assert score_normalisation(Path(adapter)) == (3.0, 2.0)
    (Path(adapter) / "score_normalisation.json").unlink()
    assert score_normalisation(Path(adapter)) == (0.0, 1.0)
