"""loading.py and random_init.py: tokenizers, dropout, rotary frequencies in fp32, fresh models made once."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GPT2, LLAMA, MODELS, OPT, QWEN2, score_head
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from engine.models import loading, random_init
from engine.models.loading import (
    content_digest,
    exported_config,
    fingerprint,
    load_pretrained,
    load_tokenizer,
    read_alike,
    restore_rope,
    vocabulary_size,
)
from engine.models.random_init import byte_tokenizer, local_name


def load(name, **given):
    return load_pretrained(AutoModelForCausalLM, name, **{"dtype": torch.float32} | given)


# Tokenizers


def test_the_byte_tokenizer_reads_and_writes_any_text():
    tokenizer = byte_tokenizer()
    text = "Grüße, 日本 🙂\n\ttab"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and min(ids) >= 2 and max(ids) <= 257
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (258, 0, 1)


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert load_tokenizer(LLAMA).pad_token_id == 0  # its own is kept


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<pad>").save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=f"tokenizer of .*{tmp_path.name} did not load"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no such model folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


# Dropout and the exported config


@pytest.mark.parametrize(("name", "fields"), [(GPT2, ["attn_pdrop", "embd_pdrop", "resid_pdrop"]), (OPT, ["dropout"])])
def test_the_exported_config_gets_its_dropout_back(name, fields):
    model = load(name)
    plain = AutoConfig.from_pretrained(local_name(name))
    model.config.use_cache = False  # as gradient checkpointing leaves it
    exported = exported_config(model)
    for field in fields:
        assert getattr(plain, field) == 0.1
        assert getattr(model.config, field) == 0.0
        assert getattr(exported, field) == 0.1
    assert exported.use_cache is True and model.config.use_cache is False
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_a_critics_exported_config_gets_its_dropout_back():
    model = load_pretrained(AutoModelForSequenceClassification, score_head(GPT2), dtype=torch.float32)
    assert exported_config(model).resid_pdrop == 0.1


@pytest.mark.parametrize("family", MODELS)
def test_nothing_is_missing_from_a_whole_checkpoint_tied_heads_included(family):
    model = load(MODELS[family])
    assert model.missing_from_checkpoint == []
    assert model.saved_architectures[0].endswith(("ForCausalLM", "LMHeadModel"))


# Rotary embeddings


def frequencies(model) -> torch.Tensor:
    (found,) = [buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    return found


@pytest.mark.parametrize("name", [LLAMA, QWEN2])
def test_rope_is_fp32_again_after_a_cast_to_bf16(name):
    model = load(name)
    base, head_dim = 10_000.0, 8
    wanted = torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    torch.testing.assert_close(frequencies(model), wanted, rtol=1e-6, atol=0)
    model.to(torch.bfloat16)
    rounded = frequencies(model).float()
    assert ((rounded - wanted).abs() / wanted).max() > 9e-4  # the control: the cast did round them
    restore_rope(model)
    assert frequencies(model).dtype == torch.float32
    torch.testing.assert_close(frequencies(model), wanted, rtol=1e-6, atol=0)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_scaled_rope_keeps_its_scaling():
    scaling = (
        "{rope_type: llama3, rope_theta: 10000.0, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
        "original_max_position_embeddings: 64}"
    )
    model = load(f"{LLAMA}&rope_parameters={scaling}")
    wanted, unscaled = frequencies(model).clone(), frequencies(load(LLAMA))
    assert not torch.allclose(wanted, unscaled)
    model.to(torch.bfloat16)
    restore_rope(model)
    assert torch.equal(frequencies(model), wanted)


def test_restore_rope_leaves_models_without_rotary_embeddings_alone():
    model = load(GPT2).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restore_rope(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# random://


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rlhf_engine" / "random_models"


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_name_that_is_not_random_is_left_alone(cache):
    assert local_name("some/model") == "some/model"
    assert not cache.exists()


def test_a_fresh_model_has_the_fields_of_its_name(cache):
    config = AutoConfig.from_pretrained(local_name(LLAMA))
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (32, 2, 2)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (258, 0, 1, None)
    assert config.architectures == ["LlamaForCausalLM"]
    scored = AutoConfig.from_pretrained(local_name(score_head(LLAMA)))
    assert (scored.architectures, scored.num_labels) == (["LlamaForSequenceClassification"], 1)


def test_weights_depend_on_the_seed_and_on_nothing_else(cache, monkeypatch, tmp_path):
    torch.manual_seed(1)
    first = weights(local_name(GPT2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, weights(local_name(GPT2)))
    assert torch.equal(state, torch.get_rng_state())  # making a model draws nothing from the run's generator
    assert not same(first, weights(local_name(f"{GPT2}&seed=1")))


def test_a_half_written_model_is_made_again(cache):
    whole = Path(local_name(GPT2))
    wanted = weights(whole)
    whole.rename(whole.with_suffix(".partial"))
    (whole.with_suffix(".partial") / "model.safetensors").write_bytes(b"cut off")
    assert same(weights(local_name(GPT2)), wanted)


def _make(name, barrier, said):
    write = random_init._write

    def slow_write(*args):
        said.put("wrote")
        time.sleep(0.5)  # long enough for the other to arrive
        write(*args)

    random_init._write = slow_write
    barrier.wait(30)
    folder = local_name(name)
    said.put((folder, {key: tensor.double().sum().item() for key, tensor in weights(folder).items()}))


def test_two_processes_at_once_make_one_model(cache, monkeypatch, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make, args=(LLAMA, barrier, said)) for _ in range(2)]
    for process in processes:
        process.start()
    heard = [said.get(timeout=60) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    answers = [answer for answer in heard if answer != "wrote"]
    assert len(answers) == 2 and answers[0] == answers[1]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(answers[0][0]).name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    assert same(weights(answers[0][0]), weights(local_name(LLAMA)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random://lama?hidden_size=32", "no model type 'lama'"),
        ("random://llama?hiden_size=32", "LlamaConfig has no field hiden_size"),
        ("random://gpt2?n_embd=32&hidden=1&zebra=2", "GPT2Config has no field hidden, zebra"),
        ("random://llama?head=value", "head=value is not one of language_model, score"),
    ],
)
def test_an_unknown_type_or_field_is_named_and_leaves_no_model_behind(cache, name, said):
    for _ in range(2):  # the second time, too: nothing half-made is taken for a model
        with pytest.raises(ValueError, match=said):
            load(name)
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_alias_fields_are_known(cache):
    """GPT-2's own name for it is n_embd."""
    assert AutoConfig.from_pretrained(local_name("random://gpt2?hidden_size=32&n_layer=1&n_head=4")).n_embd == 32


@pytest.mark.parametrize("family", MODELS)
def test_a_random_model_embeds_every_token_of_its_tokenizer(family):
    """transformers gives Qwen2 a tokenizer class of its own, which knows one token more."""
    tokenizer = load_tokenizer(MODELS[family])
    assert load(MODELS[family]).config.vocab_size == vocabulary_size(tokenizer)


# Tokenizers that read alike


def test_tokenizers_that_read_alike():
    ours, same = load_tokenizer(LLAMA), load_tokenizer(LLAMA)
    same.chat_template, same.pad_token = "{{ messages }}", same.eos_token
    assert read_alike(ours, same), "neither template nor padding changes what a text is read as"


@pytest.mark.parametrize("difference", ["vocabulary", "end", "beginning"])
def test_tokenizers_that_do_not_read_alike(difference):
    ours, other = load_tokenizer(LLAMA), load_tokenizer(LLAMA)
    if difference == "vocabulary":
        other.add_tokens(["<new>"])
    elif difference == "end":
        other.eos_token = other.pad_token
    else:
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[(other.eos_token, other.eos_token_id)]
        )
    assert not read_alike(ours, other)


# Whether two names stand for the same weights


def test_a_folders_fingerprint_changes_with_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path)) and len(before) == 2
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert fingerprint(str(tmp_path)) != before


def test_a_hub_models_fingerprint_is_its_commit_whether_its_weights_are_here_or_not(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(loading, "cached_file", lambda name, file: str(snapshot / file))
    before = fingerprint("someone/model")
    (snapshot / "model.safetensors").write_bytes(b"1")
    assert fingerprint("someone/model") == before == [("someone/model", "0123abc")]


@pytest.mark.parametrize("left", [None, 100])
def test_weights_that_are_not_there_or_cut_short_are_one_message(tmp_path, left):
    """A folder without weights, and one with half a file."""
    shutil.copytree(local_name(LLAMA), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.unlink() if left is None else path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"^The weights of .*model did not load: "):
        load_pretrained(AutoModelForCausalLM, str(tmp_path / "model"), dtype=torch.float32)


@pytest.mark.parametrize("loader", [load_tokenizer, load])
def test_code_in_a_models_folder_is_not_run(tmp_path, loader):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(local_name(LLAMA), folder)
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C", "AutoTokenizer": ["theirs.C", None]}
    changed = config | {"model_type": "theirs", "auto_map": classes, "architectures": ["C"]}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes, "tokenizer_class": "C"}))
    with pytest.raises(ValueError, match=r"theirs|custom code|trust_remote_code"):
        loader(str(folder))
    assert not marker.exists()


def test_a_models_digest_is_of_its_content_wherever_it_lies(tmp_path):
    """Also where only a tensor in the middle of a large file has changed."""
    folder = Path(local_name(f"{LLAMA}&intermediate_size=9000"))
    assert (folder / "model.safetensors").stat().st_size > 2**20
    shutil.copytree(folder, tmp_path / "moved")
    assert content_digest(str(tmp_path / "moved")) == content_digest(str(folder))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        save_file(weights | {name: tensor + 1e-3}, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
        assert content_digest(str(tmp_path / "moved")) != content_digest(str(folder)), name
    shutil.copy(folder / "model.safetensors", tmp_path / "moved" / "model.safetensors")
    (tmp_path / "moved" / "score_normalisation.json").write_text("{}")
    assert content_digest(str(tmp_path / "moved")) != content_digest(str(folder))
