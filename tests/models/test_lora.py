"""An adapter in a transformers model: what it leaves alone, what it changes, what it is merged to."""

from functools import partial

import pytest
import tiny
import torch

from engine.models.adapter_folder import adapter_config
from engine.models.language_model import hidden_states, load_language_model
from engine.models.lora import (
    adapter_off,
    is_adapter,
    name_without_adapter,
    with_adapter,
)
from engine.models.scalar_head import load_critic

FORM = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
IDS = torch.tensor([[5, 6, 7, 200, 31, 8], [9, 100, 3, 44, 257, 12]])
TARGETS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}


def plain(name):
    return load_language_model(name, dtype=torch.float32)


def adapted(name, *, seed=0, **given):
    return with_adapter(partial(plain, name), seed=seed, **FORM | given)


def stirred(wrapper):
    """With an adapter that does something."""
    tiny.stir_adapters(wrapper, 0.3)
    return wrapper


@pytest.mark.parametrize("family", tiny.MODELS)
def test_switched_off_it_is_the_model_as_it_was_bit_for_bit(family):
    """And so it is before it has learnt anything; the model stays the class it was."""
    before, after = plain(tiny.MODELS[family]), adapted(tiny.MODELS[family])
    wanted = hidden_states(before.model, IDS)
    assert type(after.model) is type(before.model)
    assert torch.equal(hidden_states(after.model, IDS), wanted)
    stirred(after)
    assert not torch.allclose(hidden_states(after.model, IDS), wanted, atol=1e-2)
    with adapter_off(after):
        assert torch.equal(hidden_states(after.model, IDS), wanted)
    assert not torch.allclose(hidden_states(after.model, IDS), wanted, atol=1e-2)
    assert all(parameter.requires_grad == is_adapter(name) for name, parameter in after.named_parameters())


def test_it_comes_back_after_an_exception():
    wrapper = stirred(adapted(tiny.LLAMA))
    wanted = hidden_states(wrapper.model, IDS)
    with pytest.raises(RuntimeError), adapter_off(wrapper):
        raise RuntimeError
    assert torch.equal(hidden_states(wrapper.model, IDS), wanted)
    assert all(parameter.requires_grad == is_adapter(name) for name, parameter in wrapper.named_parameters())


@pytest.mark.parametrize("family", tiny.MODELS)
def test_it_adapts_every_linear_layer_of_the_backbone_and_no_head(family):
    wrapper = adapted(tiny.MODELS[family])
    layers = {name.split(".lora_A")[0] for name, _ in wrapper.named_parameters() if ".lora_A." in name}
    assert {layer.split(".")[-1] for layer in layers} == TARGETS[family]
    assert len(layers) == 2 * len([1 for layer in layers if ".0." in layer]), "both of the model's layers"
    assert "lora" not in repr(wrapper.head)


@pytest.mark.parametrize("family", tiny.MODELS)
def test_it_adds_the_product_of_two_matrices(family):
    """Against a model whose weights were changed by hand: W + alpha / r * B A, turned round where GPT-2's W is."""
    wrapper, by_hand = stirred(adapted(tiny.MODELS[family])), plain(tiny.MODELS[family])
    found = dict(wrapper.named_parameters())
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            layer = name.rsplit(".", 1)[0]
            if name.endswith(".weight") and f"{layer}.lora_A.default.weight" in found:
                a, b = (found[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
                change = 16.0 / 4 * (b @ a)
                weight += change.T if family == "gpt2" else change
    torch.testing.assert_close(hidden_states(wrapper.model, IDS), hidden_states(by_hand.model, IDS), rtol=0, atol=1e-4)


def test_an_exported_adapter_is_no_model_to_start_from(tmp_path):
    adapter_config(adapted(tiny.LLAMA).model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is an adapter, not a model: start from one that lora\.export=merged"):
        plain(str(tmp_path))


def test_every_rank_draws_the_same_adapter():
    first, again, other = (
        {name: p for name, p in adapted(tiny.LLAMA, seed=seed).named_parameters() if is_adapter(name)}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_named_layers_are_adapted():
    wrapper = adapted(tiny.LLAMA, target_modules=["q_proj", "mlp.down_proj"])
    layers = {name.split(".lora_A")[0].split(".")[-1] for name, _ in wrapper.named_parameters() if ".lora_A." in name}
    assert layers == {"q_proj", "down_proj"}


@pytest.mark.parametrize("wrong", ["query", "lm_head", "embed_tokens", "mlp", "proj"])
def test_a_name_that_matches_nothing_lists_those_that_do(wrong):
    with pytest.raises(ValueError, match=rf"{wrong} is no linear layer .* There are down_proj, gate_proj, k_proj, o_p"):
        adapted(tiny.LLAMA, target_modules=["q_proj", wrong])


def test_a_scalar_head_is_trained_beside_it():
    build = partial(load_critic, tiny.score_head(tiny.LLAMA), dtype=torch.float32, pad_token_id=0, seed=0)
    critic = with_adapter(build, seed=0, **FORM)
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not is_adapter(name)} == {"model.score.weight"}
    assert any(is_adapter(name) for name in trained)


def test_names_go_back_to_those_of_the_model():
    """Otherwise an export would hold weights that no model asks for."""
    names = {name for name, _ in plain(tiny.OPT).named_parameters()}
    adapted_names = {name for name, _ in adapted(tiny.OPT).named_parameters() if not is_adapter(name)}
    assert {name_without_adapter(name) for name in adapted_names} == names
    assert adapted_names != names


@pytest.mark.parametrize("family", tiny.MODELS)
def test_gradient_checkpointing_leaves_the_gradients_alone(family):
    """Nothing before the first adapter needs a gradient: with checkpoints of the other kind there would be none."""
    gradients = []
    for checkpointing in (False, True):
        wrapper = stirred(adapted(tiny.MODELS[family])).train()
        if checkpointing:
            wrapper.model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden_states(wrapper.model, IDS).square().mean().backward()
        gradients.append({name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None})
    without, with_it = gradients
    assert without.keys() == with_it.keys() == {n for n, _ in wrapper.named_parameters() if is_adapter(n)}
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, rtol=0, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0
