"""linear_layers.py: large layers compute by the faster library, and are the same layers in every other way."""

import os
import subprocess
import sys
from functools import partial

import engines
import pytest
import ranks
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.algorithms import matrix_products
from engine.algorithms.matrix_products import SMALLEST
from engine.distributed import comm
from engine.distributed.gather import gathered_for_generation, is_sharded
from engine.models import linear_layers
from engine.models.language_model import hidden_states, load_language_model
from engine.models.linear_layers import (
    AdaptedLinear,
    Linear,
    LowRankLinear,
    TransposedLinear,
    packed_weights,
    use_fast_products,
)
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

LARGE = {"llama": tiny.LARGE_LLAMA, "gpt2": tiny.LARGE_GPT2}
LARGE_LAYERS = {"llama": {"gate_proj", "up_proj", "down_proj"}, "gpt2": {"c_attn", "c_fc", "mlp.c_proj"}}
SMALL_LAYERS = {"llama": {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}, "gpt2": {"attn.c_proj", "lm_head"}}
FAST = (Linear, TransposedLinear)
IDS = torch.tensor([[5, 6, 7, 200, 31, 8], [9, 100, 3, 44, 257, 12]])
MANY_IDS = torch.randint(2, 258, (3, 40), generator=torch.Generator().manual_seed(0))

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch is without oneDNN", allow_module_level=True)


def switch(patch, faster: bool) -> None:
    """As on a processor of which this is so, without a GPU."""
    patch.setattr(torch.accelerator, "is_available", lambda: False)
    patch.setattr(matrix_products, "ONEDNN_IS_FASTER", faster)
    patch.setattr(linear_layers, "ONEDNN_IS_FASTER", faster)


@pytest.fixture
def faster(monkeypatch):
    """`faster(bool)`: as on a processor of which this is so. True to begin with."""
    switch(monkeypatch, True)
    return partial(switch, monkeypatch)


def loaded(name, **given):
    return load_language_model(name, dtype=torch.float32, **given)


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


def told(wrapper, ids=IDS):
    """What a model computes, and the gradient of every weight."""
    hidden = hidden_states(wrapper.model, ids)
    # Not a sum of squares, which the last norm has made a constant.
    hidden.mul(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).mean().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in wrapper.named_parameters()}


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


# An adapter around the layers


def adapted(name):
    """With an adapter that does something."""
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
    wrapper = with_adapter(partial(loaded, name), seed=0, **form)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name_of, parameter in wrapper.named_parameters():
            if is_adapter(name_of):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
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
    assert fast_layers(wrapper) and not any(isinstance(module, AdaptedLinear) for module in wrapper.modules())
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
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
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


# What oneDNN keeps

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MANY_ROWS = """
import psutil
import torch
from engine.models.linear_layers import use_fast_products
torch.set_num_threads(1)
{before}
weight = torch.ones(384, 384)
def resident(rows):
    for count in rows:
        torch.ops.mkldnn._linear_pointwise(torch.ones(count, 384), weight, None, "none", [], "")
    return psutil.Process().memory_info().rss
before = resident(range(64, 264))
print("grown", resident(range(264, 464)) - before, flush=True)
"""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TOLD = "use_fast_products(torch.nn.Identity())"


def grown(before: str, **environment: str) -> float:
    """MiB that a process of its own gains from its 201st to its 400th number of rows."""
    free_at_once = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    mine = {name: of for name, of in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", MANY_ROWS.format(before=before)],
        env=mine | ranks.OFFLINE | NO_GPU | free_at_once | environment,
        cwd=ranks.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 2**20


@pytest.fixture(scope="module")
def forgetting_nothing() -> float:
    """Negative control: of a process that tells oneDNN nothing."""
    found = grown("")
    if found < 50:
        pytest.skip("oneDNN keeps little on this processor")
    return found


def test_kernels_of_many_numbers_of_rows_are_let_go_of(forgetting_nothing):
    assert grown(TOLD) < forgetting_nothing / 4


@pytest.mark.parametrize("name", KERNELS)
def test_the_users_own_number_of_kernels_stays(monkeypatch, name):
    for other in KERNELS:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "1000")
    use_fast_products(nn.Identity())
    assert [os.environ.get(other) for other in KERNELS] == ["1000" if other == name else None for other in KERNELS]


def test_a_loaded_model_remembers_few(faster, monkeypatch):
    for name in KERNELS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    loaded(tiny.LLAMA)
    assert [os.environ[name] for name in KERNELS] == ["128", "128"]
