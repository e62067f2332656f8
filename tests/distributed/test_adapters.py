"""An adapter under every sharding: it alone learns, it is exported alone or merged, and switched off it is gone."""

import json
import math
from functools import partial
from pathlib import Path

import engines
import pytest
import tiny
import torch
from engines import IDS, said_by_folder, said_live
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.distributed import comm
from engine.distributed.export import export_huggingface
from engine.distributed.initialize import WithoutAdapter
from engine.distributed.optimization import step_together
from engine.models.loading import load_tokenizer
from engine.models.lora import adapter_off, is_adapter, with_adapter
from engine.models.random_init import local_name
from engine.models.scalar_head import load_critic

FORM = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
KINDS = (0, 1, 2, "strict", 3, "2_offload", "3_offload")
LOSS = {"actor": engines.policy_loss, "critic": engines.value_loss}


def adapted(role, model, kind, strict_z3, **given):
    """An engine with an adapter."""
    build = engines.language_builder(model)
    if role == "critic":
        build = partial(load_critic, tiny.score_head(model), dtype=torch.float32, pad_token_id=0, seed=0)
    build = partial(with_adapter, build, seed=0, **FORM)
    return engines.trained(build, engines.ds_file(kind, strict_z3), learning_rate=1e-2, **given)


def step(engine, role, seed, factor=1.0):
    engines.backward(engine, LOSS[role], engines.rows(seed=seed), factor=factor)
    norms = step_together([engine], healthy=True)
    return norms and norms[0]


def what_learns(role, kind, strict_z3):
    """Names of weights that a few steps change, and of those that they leave; what the engine says without adapter."""
    engine = adapted(role, tiny.LLAMA, kind, strict_z3)
    before, said = engines.weights(engine), said_live(engine, role)
    norms = [step(engine, role, seed) for seed in range(3)]
    after = engines.weights(engine)
    changed = sorted(name for name in after if not torch.equal(before[name], after[name]))
    with adapter_off(engine.module):
        off = said_live(engine, role)
    return changed, sorted(after.keys() - set(changed)), said, off, said_live(engine, role), norms


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_learns_and_the_model_stays(run_ranks, strict_z3, role, kind):
    changed, stayed, said, off, now, norms = run_ranks(what_learns, role, kind, strict_z3)[0]
    assert {name for name in changed if not is_adapter(name)} == ({"model.score.weight"} if role == "critic" else set())
    assert not [name for name in stayed if is_adapter(name)]
    assert not torch.allclose(now, said, atol=1e-3), "it learns"
    assert torch.equal(off, said) == (role == "actor"), "a critic's head is not part of the adapter"
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


def losses_and_norms(role, kind, strict_z3, checkpointing=False):
    engine = adapted(role, tiny.GPT2, kind, strict_z3, gradient_checkpointing=checkpointing)
    norms = [step(engine, role, seed) for seed in range(3)]
    return norms, said_live(engine, role)


@pytest.fixture(scope="module", params=["actor", "critic"])
def plain(request, run_ranks):
    """What one rank comes to without sharding."""
    return request.param, *run_ranks(losses_and_norms, request.param, 0, "", world_size=1)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_neither_sharding_nor_ranks_nor_checkpointing_change_it(run_ranks, strict_z3, kind, checkpointing, plain):
    role, norms, said = plain
    for ours, live in run_ranks(losses_and_norms, role, kind, strict_z3, checkpointing):
        assert ours == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(live, said, rtol=0, atol=1e-5)


def with_a_bad_step(kind, strict_z3):
    """A healthy step, one that is NaN on rank 1 alone, a healthy one; and without the second."""
    bad, runs = math.nan if comm.rank() == 1 else 1.0, []
    for steps in ([(0, 1.0), (1, bad), (2, 1.0)], [(0, 1.0), (2, 1.0)]):
        engine = adapted("critic", tiny.LLAMA, kind, strict_z3)
        norms = [step(engine, "critic", seed, factor) for seed, factor in steps]
        runs.append((norms, engines.digest(engine)))
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_leaves_no_trace(run_ranks, strict_z3, kind):
    (norms, digest), (healthy, expected) = run_ranks(with_a_bad_step, kind, strict_z3)[0]
    assert norms == [healthy[0], None, healthy[1]]
    assert digest == expected


def rates(strict_z3):
    """How far a step of AdamW moves what has which learning rate, at most."""
    engine = adapted("critic", tiny.LLAMA, 2, strict_z3, adapter_learning_rate=1e-3)
    before = engines.weights(engine)
    step(engine, "critic", 0)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in engines.weights(engine).items()}
    return max(far for name, far in moved.items() if is_adapter(name)), moved["model.score.weight"]


def test_the_adapter_has_a_learning_rate_of_its_own(run_ranks, strict_z3):
    adapter, head = run_ranks(rates, strict_z3)[0]
    assert adapter == pytest.approx(1e-3, rel=0.05)
    assert head == pytest.approx(1e-2, rel=0.05)


def train_and_export(role, model, kind, strict_z3, folder):
    engine = adapted(role, model, kind, strict_z3)
    for seed in range(3):
        step(engine, role, seed)
    before = engines.digest(engine), said_live(engine, role)
    for form in ("merged", "adapter"):
        export_huggingface(engine, Path(folder) / form, load_tokenizer(model), form=form)
    assert engines.digest(engine) == before[0] and torch.equal(said_live(engine, role), before[1]), "it changes nothing"
    return before[1]


@torch.no_grad()
def said_by_adapter(folder, role, model):
    """The same from the model that training began with and the exported adapter: by PEFT, and by transformers."""
    start = local_name(model if role == "actor" else tiny.score_head(model))
    auto = AutoModelForCausalLM if role == "actor" else AutoModelForSequenceClassification
    by_peft = PeftModel.from_pretrained(auto.from_pretrained(start), folder).merge_and_unload().eval()
    by_transformers = auto.from_pretrained(start).eval()
    by_transformers.load_adapter(str(folder))
    for whole in (by_peft, by_transformers):
        if role == "actor":
            yield whole(IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
        else:
            yield whole.score(whole.base_model(IDS).last_hidden_state).squeeze(-1)


@pytest.mark.parametrize("kind", [2, "strict"])
@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_export_says_what_the_engine_says(run_ranks, strict_z3, tmp_path, role, model, kind):
    live, _ = run_ranks(train_and_export, role, model, kind, strict_z3, str(tmp_path))
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    start = local_name(model if role == "actor" else tiny.score_head(model))
    assert not torch.allclose(said_by_folder(start, role), live, atol=1e-2), "it was trained"
    torch.testing.assert_close(said_by_folder(merged, role), live, rtol=0, atol=1e-5)
    for said in said_by_adapter(adapter, role, model):
        torch.testing.assert_close(said, live, rtol=0, atol=1e-5)
    assert not any("lora" in path.name or "adapter" in path.name for path in merged.iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert "model.safetensors" not in {path.name for path in adapter.iterdir()}
    assert AutoTokenizer.from_pretrained(adapter).get_vocab() == load_tokenizer(model).get_vocab()


def ref_beside_actor(kind, strict_z3):
    """Log-probabilities of the ref before and after steps, the actor's mode beside it, and its own after it."""
    engine = adapted("actor", tiny.LLAMA, kind, strict_z3)
    ref = WithoutAdapter(engine)
    batch = engines.rows().padded(torch.arange(4), comm.device())
    given = (batch.input_ids, batch.positions, batch.targets)
    before = ref(*given, **engines.TEMPERATURE).logprobs
    for seed in range(3):
        step(engine, "actor", seed)
    engine.train()
    after = ref(*given, **engines.TEMPERATURE).logprobs
    ours = engine(*given, **engines.TEMPERATURE).logprobs.detach()
    return before, after, ours, engine.module.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_ref_is_where_training_began(run_ranks, strict_z3, kind):
    for before, after, ours, training in run_ranks(ref_beside_actor, kind, strict_z3):
        assert torch.equal(before, after)
        assert not torch.allclose(ours, after, atol=1e-3)
        assert training


def between_forward_and_backward(kind, strict_z3, asked):
    """Gradients' norm where the ref is asked between the actor's forward pass and its backward pass."""
    engine = adapted("actor", tiny.LLAMA, kind, strict_z3, gradient_checkpointing=True)
    ref = WithoutAdapter(engine)

    def loss_of(module, batch, count):
        loss = engines.policy_loss(module, batch, count)
        if asked:
            ref(batch.input_ids, batch.positions, batch.targets, **engines.TEMPERATURE)
        return loss

    norms = []
    for seed in range(3):
        engines.backward(engine, loss_of, engines.rows(seed=seed))
        norms += step_together([engine], healthy=True)
    return norms


@pytest.mark.parametrize("kind", KINDS)
def test_asking_the_ref_leaves_gradients_alone(run_ranks, strict_z3, kind):
    asked, plainly = (run_ranks(between_forward_and_backward, kind, strict_z3, asked)[0] for asked in (True, False))
    assert asked == plainly
