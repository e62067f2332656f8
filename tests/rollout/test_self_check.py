"""self_check.py: ordinary decoders pass at every sharding, and models that PPO would get wrong in silence do not."""

import engines
import pytest
import tiny

from engine.models.language_model import LanguageModel
from engine.rollout.self_check import check_language_model

SIZES = "hidden_size=32&num_hidden_layers=2"
MAMBA = f"random://mamba?{SIZES}&state_size=8"


def verdict(name, ds_config, break_it=None):
    """What is said against a model; None when it passes."""
    engine = engines.actor(name, ds_config)
    if break_it is not None:
        break_it(engine.module)
    engine.eval()
    try:
        check_language_model(engine, role="actor")
    except ValueError as error:
        return str(error)
    finally:
        assert not engine.module.training, "the mode is put back"
    return None


@pytest.mark.parametrize("kind", [0, "strict"])
@pytest.mark.parametrize("family", tiny.MODELS)
def test_ordinary_decoders_pass(run_ranks, strict_z3, family, kind):
    assert run_ranks(verdict, tiny.MODELS[family], engines.ds_file(kind, strict_z3)) == [None, None]


def test_a_bfloat16_model_is_allowed_its_rounding(run_ranks):
    assert run_ranks(bfloat16_verdict) == [None, None]


def bfloat16_verdict():
    engine = engines.actor(tiny.LLAMA, engines.ds_file(1, ""), dtype="bfloat16")
    return check_language_model(engine, role="actor")


def test_a_state_space_model_that_forgets_between_tokens(run_ranks):
    for said in run_ranks(verdict, MAMBA, engines.ds_file(0, "")):
        assert said.startswith(
            "The actor is a MambaForCausalLM, which gives other log-probabilities from its key-value"
        )


def scale_the_head(module: LanguageModel):
    head = module.head
    plain = head.forward
    head.forward = lambda states: plain(states) / 4


def test_a_head_with_a_scale_of_its_own(run_ranks):
    for said in run_ranks(verdict, tiny.LLAMA, engines.ds_file(0, ""), scale_the_head):
        assert "other log-probabilities here than from its own logits" in said


def noise_in_training(module: LanguageModel):
    def jitter(layer, args):
        return tuple(arg * 1.5 if layer.training else arg for arg in args)

    module.model.base_model.layers[0].mlp.register_forward_pre_hook(jitter)


def test_a_router_that_draws_noise_in_training(run_ranks):
    for said in run_ranks(verdict, tiny.LLAMA, engines.ds_file(0, ""), noise_in_training):
        assert "other log-probabilities in training mode, with dropout off" in said
