"""linear_layers.py: large layers compute by the faster library, and are the same layers in every other way."""

import engines
import pytest
import tiny
import torch
from large_layers import FAST, IDS, LARGE, loaded, switch, told
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.algorithms.matrix_products import SMALLEST
from engine.distributed import comm
from engine.distributed.gather import is_sharded
from engine.models.language_model import hidden_states
from engine.models.linear_layers import Linear, packed_weights, use_fast_products
from engine.models.random_init import local_name

LARGE_LAYERS = {"llama": {"gate_proj", "up_proj", "down_proj"}, "gpt2": {"c_attn", "c_fc", "mlp.c_proj"}}
SMALL_LAYERS = {"llama": {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}, "gpt2": {"attn.c_proj", "lm_head"}}

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch is without oneDNN", allow_module_level=True)


def fast_layers(model) -> set[str]:
    """The ends of the names of the layers that were swapped."""
    return {name for name, module in model.named_modules() if isinstance(module, FAST)}


def ends(name: str, layers: set[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in layers)


@pytest.mark.parametrize("family", LARGE)
def test_the_large_layers_of_a_loaded_model_are_swapped_and_no_others(faster, family):
    model = loaded(LARGE[family]).model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert len(fast_layers(model)) == 2 * len(LARGE_LAYERS[family]), "of both of the model's layers"
    for name, module in linear.items():
        assert isinstance(module, FAST) == ends(name, LARGE_LAYERS[family]) == (module.weight.numel() >= SMALLEST)
        assert isinstance(module, FAST) or type(module) in (nn.Linear, Conv1D)
        assert isinstance(module, FAST) or ends(name, SMALL_LAYERS[family])
        assert isinstance(module, Conv1D) == (family == "gpt2" and name != "lm_head")


@pytest.mark.parametrize("family", LARGE)
def test_where_it_is_no_faster_nothing_is_swapped(faster, family):
    faster(False)
    model = loaded(LARGE[family]).model
    classes = {name: type(module) for name, module in model.named_modules()}
    use_fast_products(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not fast_layers(model)


def test_with_an_accelerator_nothing_is_swapped(faster, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not fast_layers(loaded(tiny.LARGE_LLAMA).model)


@pytest.mark.parametrize("family", LARGE)
def test_it_is_the_same_model_to_rounding(faster, family):
    fast = loaded(LARGE[family])
    faster(False)
    plain = loaded(LARGE[family])
    assert fast_layers(fast) and not fast_layers(plain)
    hidden, gradients = told(plain)
    faster(True)
    same_hidden, same_gradients = told(fast)
    torch.testing.assert_close(same_hidden, hidden, rtol=0, atol=1e-5)
    different = not torch.equal(same_hidden, hidden)
    for name, gradient in gradients.items():
        if gradient is None:  # of the untied head, which says nothing here
            assert same_gradients[name] is None
            continue
        scale = gradient.abs().max().item()
        torch.testing.assert_close(same_gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
        different |= not torch.equal(same_gradients[name], gradient)
    assert different, "the products are another library's"


@pytest.mark.parametrize("family", LARGE)
def test_its_state_dict_is_the_same_bit_for_bit(faster, family):
    fast = loaded(LARGE[family])
    faster(False)
    plain = loaded(LARGE[family])
    kept, wanted = fast.state_dict(), plain.state_dict()
    assert list(kept) == list(wanted)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    plain.load_state_dict(kept)
    fast.load_state_dict(wanted)


def test_a_linear_layer_of_another_kind_keeps_its_own_way(faster):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(512, 512), nn.Linear(512, 512), nn.Linear(511, 256))
    use_fast_products(model)
    assert [type(module) for module in model] == [Doubled, Linear, nn.Linear]
    use_fast_products(model)
    assert [type(module) for module in model] == [Doubled, Linear, nn.Linear], "once is enough"


@pytest.mark.parametrize("family", LARGE)
def test_layers_of_4_bits_keep_their_own_way(faster, family):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")
    plain = {name for name, _ in loaded(LARGE[family]).model.named_modules()}
    quantised = loaded(LARGE[family], quantization="nf4").model
    assert {name for name, _ in quantised.named_modules()} == plain
    assert not fast_layers(quantised)
    assert torch.isfinite(hidden_states(quantised, IDS)).all()


# In shards


def trained_in_shards(name, kinds, strict_z3):
    """Of each sharding: the layers swapped, whether they are shards, and two steps' losses and the weights after them.
    A step's size is that of the gradients: AdamW divides it out of those that are as small as rounding.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, faster in kinds:
            switch(patch, faster)
            path = engines.ds_file(kind, strict_z3)
            engine = engines.trained(engines.language_builder(name), path, epsilon=1e-3)
            layers = [module for module in engine.module.modules() if isinstance(module, FAST)]
            shards = [is_sharded(module.weight) for module in layers]
            losses = [engines.train_actor(engine, seed) for seed in range(2)]
            found[kind, faster] = len(layers), all(shards), losses, engines.weights(engine)
    return found, comm.rank()


KINDS = ((0, False), (0, True), ("strict", True), (3, True))


@pytest.mark.parametrize("family", LARGE)
def test_in_shards_they_are_swapped_too_and_train_alike(run_ranks, strict_z3, family):
    local_name(LARGE[family])  # made here: under ZeRO-3 the ranks would wait for each other
    for found, _ in run_ranks(trained_in_shards, LARGE[family], KINDS, strict_z3):
        assert [found[kind][0] for kind in KINDS] == [0, 6, 6, 6]
        assert [found[kind][1] for kind in KINDS[1:]] == [False, True, True]
        _, _, losses, weights = found[0, False]
        untrained = loaded(LARGE[family]).state_dict()
        for kind in KINDS[1:]:
            _, _, same_losses, same_weights = found[kind]
            assert same_losses == pytest.approx(losses, abs=1e-5)
            for name, weight in weights.items():
                torch.testing.assert_close(same_weights[name], weight, rtol=0, atol=2e-6, msg=f"{kind} {name}")
                assert (weight - untrained[name]).abs().max() > 1e-5, "it has been trained"


# Packed for a rollout


@pytest.mark.parametrize("family", LARGE)
def test_packed_weights_say_the_same_and_are_let_go_of(faster, family):
    """Bit for bit, but for a single row."""
    wrapper = loaded(LARGE[family])
    layers = [module for module in wrapper.modules() if isinstance(module, FAST)]
    several, single = (IDS, IDS[:, :1], IDS[:1].repeat(3, 1)[:, :5]), IDS[:1, :1]
    with torch.no_grad():
        wanted = [hidden_states(wrapper.model, ids) for ids in several]
        alone = hidden_states(wrapper.model, single)
        with packed_weights(wrapper):
            assert layers and all(layer.packed is not None for layer in layers)
            for ids, states in zip(several, wanted, strict=True):
                assert torch.equal(hidden_states(wrapper.model, ids), states)
            torch.testing.assert_close(hidden_states(wrapper.model, single), alone, rtol=0, atol=1e-5)
            assert list(wrapper.state_dict()) == list(loaded(LARGE[family]).state_dict()), "no weights of their own"
            layers[0].weight.mul_(2)
            assert torch.equal(hidden_states(wrapper.model, IDS), wanted[0]), "the copies are read"
        assert all(layer.packed is None for layer in layers)
        assert not torch.allclose(hidden_states(wrapper.model, IDS), wanted[0], atol=1e-3)


def test_weights_are_let_go_of_after_an_error(faster):
    wrapper = loaded(tiny.LARGE_LLAMA)
    with pytest.raises(KeyError), packed_weights(wrapper):
        raise KeyError
    assert all(layer.packed is None for layer in wrapper.modules() if isinstance(layer, FAST))


def test_nothing_is_packed_where_nothing_was_swapped(faster):
    faster(False)
    wrapper = loaded(tiny.LARGE_LLAMA)
    with packed_weights(wrapper):
        assert not any(hasattr(module, "packed") for module in wrapper.modules())
