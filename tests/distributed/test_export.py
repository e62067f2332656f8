"""What is exported loads with plain from_pretrained in one process, and says what the live engine says."""

import hashlib
import json
from pathlib import Path

import engines
import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.distributed import comm
from engine.distributed.export import export_huggingface
from engine.distributed.optimization import step_together
from engine.models.loading import load_tokenizer

KINDS = (0, 1, 2, "strict")


def trained(role, model, kind, strict_z3):
    """An engine a step away from where it started."""
    path = engines.ds_file(kind, strict_z3)
    engine = engines.actor(model, path) if role == "actor" else engines.critic(tiny.score_head(model), path)
    loss_of = engines.policy_loss if role == "actor" else engines.value_loss
    for seed in range(3):
        engines.backward(engine, loss_of, engines.rows(seed=seed))
        step_together([engine], healthy=True)
    return engine


def train_and_export(role, model, kind, strict_z3, folder):
    engine = trained(role, model, kind, strict_z3)
    naive = sum(tensor.numel() for tensor in engine.module.model.state_dict().values())
    before = engines.digest(engine), engine.module.model.config.use_cache
    export_huggingface(engine, Path(folder), load_tokenizer(model))
    assert (engines.digest(engine), engine.module.model.config.use_cache) == before, "exporting changes nothing"
    return engines.said_live(engine, role), naive


CASES = [
    *(
        pytest.param(role, tiny.LLAMA, kind, id=f"llama {role}, {kind}")
        for role in ("actor", "critic")
        for kind in KINDS
    ),
    *(pytest.param("actor", tiny.GPT2, kind, id=f"gpt2 actor (tied), {kind}") for kind in KINDS),
    pytest.param("critic", tiny.GPT2, "strict", id="gpt2 critic, strict"),
    pytest.param("actor", tiny.OPT, "strict", id="opt actor, strict"),
]


@pytest.mark.parametrize(("role", "model", "kind"), CASES)
def test_an_export_says_what_the_engine_says(run_ranks, strict_z3, tmp_path, role, model, kind):
    folder = tmp_path / "export"
    (live, naive), _ = run_ranks(train_and_export, role, model, kind, strict_z3, str(folder))
    torch.testing.assert_close(engines.said_by_folder(folder, role), live, rtol=0, atol=1e-5)
    assert not torch.allclose(engines.said_by_folder(_start(role, model), role), live, atol=1e-3), "it was trained"
    # Negative control: what ZeRO-3 leaves in a plain state_dict is nothing.
    assert (naive == 0) == (kind == "strict")

    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    if model == tiny.GPT2:
        assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.1
    if model == tiny.OPT:
        assert config["dropout"] == 0.1
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer(model).get_vocab()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["export"], "no half-done folder is left"


def _start(role, model):
    from engine.models.random_init import local_name

    return local_name(model if role == "actor" else tiny.score_head(model))


def export_half(kind, strict_z3, folder):
    engine = engines.actor(tiny.LLAMA, engines.ds_file(kind, strict_z3), dtype="bfloat16")
    export_huggingface(engine, Path(folder), load_tokenizer(tiny.LLAMA))


@pytest.mark.parametrize("kind", [2, "strict"])
def test_an_export_has_the_training_dtype(run_ranks, strict_z3, tmp_path, kind):
    folder = tmp_path / "export"
    run_ranks(export_half, kind, strict_z3, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def export_broken(kind, strict_z3, folder):
    """A healthy export, then one with a NaN weight; what was said, and files before and after."""
    path = engines.ds_file(kind, strict_z3)
    tokenizer = load_tokenizer(tiny.LLAMA)
    export_huggingface(engines.actor(tiny.LLAMA, path), Path(folder), tokenizer)
    comm.barrier()
    before = _files(folder)
    comm.barrier()
    broken = engines.trained(_with_a_nan, path)
    try:
        export_huggingface(broken, Path(folder), tokenizer)
        said = None
    except ValueError as error:
        said = str(error)
    comm.barrier()
    return said, before, _files(folder), sorted(path.name for path in Path(folder).parent.iterdir() if path.is_dir())


def _with_a_nan():
    import deepspeed

    wrapper = engines.language_builder(tiny.LLAMA)()
    weight = wrapper.model.model.norm.weight
    if hasattr(weight, "ds_id"):
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data[:1] = torch.nan
    else:
        weight.data[:1] = torch.nan
    return wrapper


def _files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", [2, "strict"])
def test_a_weight_that_is_not_finite_is_not_exported(run_ranks, strict_z3, tmp_path, kind):
    for said, before, after, folders in run_ranks(export_broken, kind, strict_z3, str(tmp_path / "export")):
        assert said is not None
        assert "model.norm.weight" in said
        assert "not finite" in said
        assert after == before
        assert "model.safetensors" in after
        assert folders == ["export"]


def export_tied(folder):
    model = "random://llama?hidden_size=32&num_hidden_layers=1&num_attention_heads=4&tie_word_embeddings=true"
    engine = engines.actor(model, engines.ROOT / "ds_configs" / "zero2.json")
    engines.train_actor(engine)
    export_huggingface(engine, Path(folder), load_tokenizer(model))
    return engine.module.model.get_input_embeddings().weight.detach().clone()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_tied_embedding_is_found_by_every_class(run_ranks, tmp_path, auto_class):
    """A critic, or an encoder, that starts from an exported actor has no language-model head to find it under."""
    embedding = run_ranks(export_tied, str(tmp_path / "out"), world_size=1)[0]
    model, report = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name for name in report["missing_keys"] if "score" not in name} == set()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
