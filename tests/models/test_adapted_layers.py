"""linear_layers.py: adapters around large layers compute what PEFT's own do, trained, in shards and packed."""

from functools import partial

import engines
import pytest
import tiny
import torch
from large_layers import FAST, IDS, LARGE, loaded, switch, told
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.distributed.gather import gathered_for_generation, is_sharded
from engine.models.language_model import hidden_states, load_language_model
from engine.models.linear_layers import AdaptedLinear, LowRankLinear, packed_weights, use_fast_products
from engine.models.lora import (
    REWARD_ADAPTER,
    adapted_layers,
    adapter_off,
    adapter_on,
    is_adapter,
    merged_weight,
    with_adapter,
)
from engine.models.random_init import local_name
from engine.models.shared_trunk import load_shared_trunk

MANY_IDS = torch.randint(2, 258, (3, 40), generator=torch.Generator().manual_seed(0))

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch is without oneDNN", allow_module_level=True)


def adapted(name):
    """With an adapter that does something."""
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
    wrapper = with_adapter(partial(loaded, name), seed=0, **form)
    tiny.stir_adapters(wrapper, 0.1)
    return wrapper


@pytest.mark.parametrize("family", LARGE)
def test_an_adapter_is_put_around_them_trained_and_merged(faster, family):
    wrapper, before = adapted(LARGE[family]), loaded(LARGE[family])
    base = [layer.get_base_layer() for layer in adapted_layers(wrapper.model).values()]
    assert sum(isinstance(layer, FAST) for layer in base) == 6 < len(base), "they are inside"
    hidden, gradients = told(wrapper)
    with adapter_off(wrapper):
        assert torch.equal(hidden_states(wrapper.model, IDS), hidden_states(before.model, IDS))
    assert not torch.allclose(hidden, hidden_states(before.model, IDS), atol=1e-2)
    for name, gradient in gradients.items():
        assert (gradient is not None and gradient.abs().max() > 0) == is_adapter(name), name

    merged = loaded(LARGE[family])
    weights = dict(merged.model.named_parameters())
    for name, layer in adapted_layers(wrapper.model).items():
        weights[name.replace(".base_layer", "")].data = merged_weight(layer, dtype=torch.float32)
    torch.testing.assert_close(hidden_states(merged.model, IDS), hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ids", [IDS, MANY_IDS], ids=["few rows", "many rows"])
@pytest.mark.parametrize("family", LARGE)
def test_an_adapter_computes_as_on_plain_layers(faster, family, ids):
    fast = adapted(LARGE[family])
    assert sum(isinstance(module, AdaptedLinear) for module in fast.modules()) == 6
    assert sum(isinstance(module, LowRankLinear) for module in fast.modules()) == 12
    hidden, gradients = told(fast, ids)
    faster(False)
    plain = adapted(LARGE[family])
    assert not any(isinstance(module, AdaptedLinear | LowRankLinear) for module in plain.modules())
    plain_hidden, plain_gradients = told(plain, ids)
    torch.testing.assert_close(hidden, plain_hidden, rtol=0, atol=1e-5)
    for name, gradient in plain_gradients.items():
        if gradient is not None:
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


def test_an_adapter_in_16_bits_stays_pefts_own(faster):
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
    build = partial(load_language_model, tiny.LARGE_LLAMA, dtype=torch.bfloat16)
    wrapper = with_adapter(build, seed=0, **form)
    kinds = {type(module) for module in wrapper.modules()}
    assert kinds & set(FAST) and not kinds & {AdaptedLinear, LowRankLinear}
    assert torch.isfinite(hidden_states(wrapper.model, IDS)).all()


# What PEFT has: forms of the first adapter, and whether it is merged and whether a second one is switched on.
FORMS = {
    "plain": ({}, False, False),
    "dropout": ({"lora_dropout": 0.5}, False, False),
    "rsLoRA": ({"use_rslora": True}, False, False),
    "DoRA": ({"use_dora": True}, False, False),
    "biases": ({"lora_bias": True}, False, False),
    "merged": ({}, True, False),
    "two of them": ({}, False, True),
    "two of them, with biases": ({"lora_bias": True}, False, True),
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_an_adapted_layer_is_pefts_own_in_every_form(faster, layer, kind):
    """In training and, packed or not, without gradients."""
    form, merged, two = FORMS[kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = layer(512, 512)

        def forward(self, x):
            return self.inner(x)

    def built(faster_here):
        faster(faster_here)
        model = Model()
        form_of = dict(r=4, lora_alpha=16, target_modules=["inner"], fan_in_fan_out=layer is Conv1D)
        inject_adapter_in_model(LoraConfig(**form_of, **form), model, "default")
        if two:
            inject_adapter_in_model(LoraConfig(**form_of), model, "second")
            model.inner.set_adapter(["default", "second"])
        tiny.stir_adapters(model, 0.1)
        if merged:
            model.inner.merge()
        use_fast_products(model)
        return model.inner

    own, theirs = built(True), built(False)
    assert type(own) is AdaptedLinear and type(theirs) is lora.Linear
    x = torch.randn(3, 40, 512, generator=torch.Generator().manual_seed(2)).requires_grad_()
    said = []
    for module in (own, theirs):
        torch.manual_seed(3)  # of the dropout
        output = module.train()(x)
        output.square().mean().backward()
        said.append((output.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
    (output, gradients), (their_output, their_gradients) = said
    torch.testing.assert_close(output, their_output, rtol=0, atol=1e-4)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)
    with torch.no_grad():
        wanted = theirs.eval()(x)
        torch.testing.assert_close(own.eval()(x), wanted, rtol=0, atol=1e-4)
        with packed_weights(own):
            assert (own.packed is not None) == own.is_plain != (own.base_layer.packed is not None)
            torch.testing.assert_close(own(x), wanted, rtol=0, atol=1e-4)


# In shards


def trained_adapters_in_shards(name, kinds, strict_z3):
    """As `trained_in_shards`, of an adapter, with a rollout from packed weights in between."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, faster in kinds:
            switch(patch, faster)
            build = partial(adapted, name)
            engine = engines.trained(build, engines.ds_file(kind, strict_z3), epsilon=1e-3)
            layers = [module for module in engine.module.modules() if isinstance(module, AdaptedLinear)]
            shards = [is_sharded(part.weight) for layer in layers for part in layer.lora_B.values()]
            losses = [engines.train_actor(engine, seed) for seed in range(2)]
            with torch.no_grad(), gathered_for_generation(engine) as whole:
                alone = hidden_states(whole.model, IDS)
                with packed_weights(whole):
                    assert all(layer.packed is not None for layer in layers)
                    merged = hidden_states(whole.model, IDS)
            torch.testing.assert_close(merged, alone, rtol=0, atol=1e-4)
            losses += [engines.train_actor(engine, seed) for seed in range(2, 4)]
            weights = {of: weight for of, weight in engines.weights(engine).items() if is_adapter(of)}
            found[kind, faster] = len(layers), all(shards), losses, weights
    return found


ADAPTER_KINDS = ((0, False), (0, True), ("strict", True), (3, True))


@pytest.mark.parametrize("family", LARGE)
def test_in_shards_adapters_train_alike(run_ranks, strict_z3, family):
    local_name(LARGE[family])
    for found in run_ranks(trained_adapters_in_shards, LARGE[family], ADAPTER_KINDS, strict_z3):
        assert [found[kind][0] for kind in ADAPTER_KINDS] == [0, 6, 6, 6]
        assert [found[kind][1] for kind in ADAPTER_KINDS[1:]] == [False, True, True]
        _, _, losses, weights = found[0, False]
        untrained = adapted(LARGE[family]).state_dict()
        for kind in ADAPTER_KINDS[1:]:
            _, _, same_losses, same_weights = found[kind]
            assert same_losses == pytest.approx(losses, abs=1e-4)
            assert weights.keys() == same_weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(same_weights[name], weight, rtol=0, atol=2e-6, msg=f"{kind} {name}")
                assert (weight - untrained[name]).abs().max() > 1e-5, "it has been trained"


# Packed for a rollout


@pytest.mark.parametrize("family", LARGE)
def test_packed_an_adapter_is_merged_into_its_layer(faster, family):
    wrapper, before = adapted(LARGE[family]), loaded(LARGE[family])
    layers = [module for module in wrapper.modules() if isinstance(module, AdaptedLinear)]
    with torch.no_grad():
        wanted = hidden_states(wrapper.model, IDS)
        with packed_weights(wrapper):
            assert len(layers) == 6 and all(layer.packed is not None for layer in layers)
            assert all(layer.base_layer.packed is None for layer in layers), "one copy, not two"
            torch.testing.assert_close(hidden_states(wrapper.model, IDS), wanted, rtol=0, atol=1e-4)
            for layer in layers:
                layer.lora_B["default"].weight.mul_(2)
            torch.testing.assert_close(hidden_states(wrapper.model, IDS), wanted, rtol=0, atol=1e-4)
            with adapter_off(wrapper):
                assert torch.equal(hidden_states(wrapper.model, IDS), hidden_states(before.model, IDS))
        assert all(layer.packed is None for layer in layers)
        assert not torch.allclose(hidden_states(wrapper.model, IDS), wanted, atol=1e-2)


def test_packed_with_one_adapter_another_is_still_itself(faster, tmp_path):
    """A shared trunk's: the actor's adapter is packed, and the reward model's is switched on for a moment."""
    reward_adapter = tiny.reward_adapter(tiny.LARGE_LLAMA, tmp_path)
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
    given = dict(dtype=torch.float32, adapter=form, reward_adapter=reward_adapter, with_value_head=True, seed=0)
    trunk = load_shared_trunk(tiny.LARGE_LLAMA, **given)
    layers = [module for module in trunk.modules() if isinstance(module, AdaptedLinear)]
    assert len(layers) == 6 and all(type(layer.lora_A[REWARD_ADAPTER]) is LowRankLinear for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        own = hidden_states(trunk.model, IDS)
        with adapter_on(trunk.model, REWARD_ADAPTER):
            scored = hidden_states(trunk.model, IDS)
        assert not torch.allclose(own, scored, atol=1e-2)
        with packed_weights(trunk), adapter_on(trunk.model, REWARD_ADAPTER):
            assert torch.equal(hidden_states(trunk.model, IDS), scored)
