"""Weights of 4 bits: what bitsandbytes keeps of a weight, what it leaves alone, what is refused."""

from functools import partial

import pytest
import tiny
import torch
from torch import nn

from engine.models import quantization
from engine.models.language_model import hidden_states, load_language_model
from engine.models.lora import adapted_layers, merged_weight, with_adapter
from engine.models.quantization import quantised_layers, unpacked
from engine.models.scalar_head import load_critic

bnb = pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")

# Dettmers et al. 2023, appendix E: the 16 numbers of NF4.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
WIDE = {"llama": tiny.WIDE_LLAMA, "gpt2": tiny.WIDE_GPT2}
IDS = torch.tensor([[5, 6, 7, 200, 31, 8], [9, 100, 3, 44, 257, 12]])


def loaded(name, kind="nf4", dtype=torch.float32):
    return load_language_model(name, dtype=dtype, quantization=kind)


@pytest.mark.parametrize("family", WIDE)
def test_a_weight_is_its_nearest_in_nf4(family):
    """By hand: blocks of 64 in bitsandbytes' layout (outputs, inputs), each over its largest; the scales are themselves
    kept in 8 bits, which moves a number by no more than a few hundredths of it.
    """
    before = dict(loaded(WIDE[family], None).model.named_modules())
    for name, layer in quantised_layers(loaded(WIDE[family]).model):
        whole = before[name].weight.detach()
        blocks = (whole.T if family == "gpt2" else whole).reshape(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = NF4[(blocks / scales)[..., None].sub(NF4).abs().argmin(-1)] * scales
        found = unpacked(layer.weight, layer=layer)
        assert found.shape == whole.shape
        blocks_found = (found.T if family == "gpt2" else found).reshape(-1, 64)
        assert (blocks_found - nearest).norm() < 0.03 * nearest.norm(), name
        assert 0.05 < (found - whole).norm() / whole.norm() < 0.12


@pytest.mark.parametrize("family", WIDE)
def test_linear_layers_of_the_backbone_have_4_bits_and_nothing_else(family):
    before, after = (dict(loaded(WIDE[family], kind).model.named_parameters()) for kind in (None, "nf4"))
    quantised = {f"{name}.weight" for name, _ in quantised_layers(loaded(WIDE[family]).model)}
    assert len(quantised) == (14 if family == "llama" else 8)
    for name, weight in after.items():
        if name in quantised:
            assert weight.dtype == torch.uint8 and weight.numel() * 2 == before[name].numel()
        else:
            assert torch.equal(weight, before[name])
    critic = load_critic(tiny.score_head(WIDE[family]), dtype=torch.float32, pad_token_id=0, seed=0, quantization="nf4")
    assert type(critic.model.score) is nn.Linear and critic.model.score.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WIDE)
def test_it_computes_with_the_unpacked_weights_in_the_runs_dtype(family, dtype):
    quantised, by_hand = loaded(WIDE[family], dtype=dtype).eval(), loaded(WIDE[family], None, dtype).eval()
    layers = dict(by_hand.model.named_modules())
    with torch.no_grad():
        for name, layer in quantised_layers(quantised.model):
            layers[name].weight.copy_(unpacked(layer.weight, layer=layer))
        ours, wanted = (hidden_states(wrapper.model, IDS) for wrapper in (quantised, by_hand))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_merged_weight_keeps_its_models_shape():
    """GPT-2 keeps (inputs, outputs), bitsandbytes turns it round."""
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=["c_attn"])
    wrapper = with_adapter(partial(loaded, tiny.WIDE_GPT2), seed=0, **form)
    name, layer = next(iter(adapted_layers(wrapper.model).items()))
    assert name == "transformer.h.0.attn.c_attn.base_layer.weight"
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    base = layer.get_base_layer()
    change = 16.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = unpacked(base.weight, layer=base) + change.T
    torch.testing.assert_close(merged_weight(layer, dtype=torch.float32), wanted, rtol=0, atol=1e-6)
    assert wanted.shape == (64, 192)


def test_weights_stay_as_they_are_where_a_cpu_multiplies_bfloat16(monkeypatch):
    """There bitsandbytes would pack them anew in eval mode."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    wrapper = loaded(tiny.WIDE_LLAMA, dtype=torch.bfloat16).eval()
    before = {name: layer.weight.data.clone() for name, layer in quantised_layers(wrapper.model)}
    with torch.no_grad():
        hidden_states(wrapper.model, IDS)
    for name, layer in quantised_layers(wrapper.model):
        assert torch.equal(layer.weight.data, before[name]), name


def test_rows_that_end_inside_a_block_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"q_proj has 32 inputs\..* no multiple of 64; leave quantization out"):
        loaded(tiny.LLAMA)


def test_without_bitsandbytes_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, .* pip install -e '\.\[quantization\]'"):
        loaded(tiny.WIDE_LLAMA)
