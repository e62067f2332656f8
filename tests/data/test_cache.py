"""cache.py: made once however many ask, complete or not at all, and never mistaken for something else."""

import importlib.util
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from words import user, word_tokenizer

import engine.data.cache as cache
import engine.data.exchanges as exchanges
from engine.data.cache import digest_of, digest_of_tokenizer, found_tensors, keep_tensors, kept_tensors
from engine.data.exchanges import tokenised
from engine.models.random_init import byte_tokenizer

THREE = {"tokens": torch.tensor([1, 2, 3])}


def never():
    raise AssertionError("made again")


def files() -> list[Path]:
    return sorted(Path(os.environ["RLHF_ENGINE_DATA_CACHE"]).glob("*.safetensors"))


# What is kept


def test_what_was_made_is_found_again_with_its_types():
    made = {"ids": torch.tensor([[1, 2], [3, 4]]).T, "none": torch.empty(0, dtype=torch.int64), "x": torch.rand(3)}
    first = kept_tensors("key", lambda: made)
    again = kept_tensors("key", never)
    for tensors in (first, again, found_tensors("key")):
        assert tensors.keys() == made.keys()
        assert all(torch.equal(tensors[name], made[name]) for name in made)
        assert all(tensors[name].dtype == made[name].dtype for name in made)


def test_nothing_is_found_under_another_key():
    keep_tensors(["a", 1], THREE)
    assert torch.equal(found_tensors(["a", 1])["tokens"], THREE["tokens"])
    for other in (["a", 2], ["a", "1"], ["a"], [["a"], 1], "a"):
        assert found_tensors(other) is None


def test_what_is_kept_again_takes_the_place_of_what_was():
    keep_tensors("key", THREE)
    keep_tensors("key", {"tokens": torch.tensor([4])})
    assert kept_tensors("key", never)["tokens"].tolist() == [4]


def module_in(folder: Path, **edits: str):
    """The cache's code in a folder of its own, beside the code that tokenises with a line more in some file."""
    folder.mkdir()
    for name in ("cache", "formatting", "exchanges", "sequences"):
        source = Path(cache.__file__).with_name(f"{name}.py")
        (folder / source.name).write_text(source.read_text() + edits.get(name, ""))
    spec = importlib.util.spec_from_file_location(f"cache_in_{folder.name}", folder / "cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_other_code_that_tokenises_finds_nothing_old(tmp_path, monkeypatch):
    keep_tensors("key", THREE)
    assert module_in(tmp_path / "same").found_tensors("key") is not None
    assert module_in(tmp_path / "sequences", sequences="# more").found_tensors("key") is not None
    assert module_in(tmp_path / "formatting", formatting="# more").found_tensors("key") is None
    assert module_in(tmp_path / "exchanges", exchanges="# more").found_tensors("key") is None
    for library in ("transformers", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{library}.__version__", "0.0.1")
            assert module_in(tmp_path / library).found_tensors("key") is None


def test_the_cache_lies_where_the_user_says(tmp_path, monkeypatch):
    keep_tensors("key", THREE)
    assert len(files()) == 1 and files()[0].is_relative_to(tmp_path)
    monkeypatch.setenv("RLHF_ENGINE_DATA_CACHE", str(tmp_path / "other"))
    assert found_tensors("key") is None
    monkeypatch.delenv("RLHF_ENGINE_DATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    keep_tensors("key", THREE)
    assert len(list((tmp_path / "xdg" / "rlhf_engine" / "data").glob("*.safetensors"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keep_tensors("key", THREE)
    assert len(list((tmp_path / "home" / ".cache" / "rlhf_engine" / "data").glob("*.safetensors"))) == 1


# Where nothing can be kept


def test_a_run_goes_on_without_a_cache_and_says_so_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RLHF_ENGINE_DATA_CACHE", str(tmp_path / "file" / "data"))
    for key in ("one", "two"):
        assert kept_tensors(key, lambda: THREE)["tokens"].tolist() == [1, 2, 3]
        keep_tensors(key, THREE)
        assert found_tensors(key) is None
    (said,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "file" / "data") in said and "RLHF_ENGINE_DATA_CACHE" in said
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RLHF_ENGINE_DATA_CACHE", str(tmp_path / "file" / "other"))
    assert kept_tensors("one", lambda: THREE)["tokens"].tolist() == [1, 2, 3]
    assert capsys.readouterr().out == ""


def test_what_cannot_be_made_is_an_error_with_a_cache_or_without(tmp_path, monkeypatch):
    def failing():
        raise OSError("the source is gone")

    for folder in (tmp_path / "data", tmp_path / "file" / "data"):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("RLHF_ENGINE_DATA_CACHE", str(folder))
        with pytest.raises(OSError, match="the source is gone"):
            kept_tensors("key", failing)


def test_a_cache_that_can_only_be_read_is_read(monkeypatch, capsys):
    def refused(*_):
        raise OSError("Read-only file system")

    keep_tensors("key", THREE)
    monkeypatch.setattr(cache.fcntl, "flock", refused)
    monkeypatch.setattr(cache, "save_file", refused)
    assert kept_tensors("key", never)["tokens"].tolist() == [1, 2, 3]
    assert kept_tensors("other", lambda: THREE)["tokens"].tolist() == [1, 2, 3]
    assert "Read-only file system" in capsys.readouterr().out


def test_a_damaged_file_is_made_anew(capsys):
    keep_tensors("key", THREE)
    (file,) = files()
    file.write_bytes(b"")
    assert found_tensors("key") is None
    assert kept_tensors("key", lambda: THREE)["tokens"].tolist() == [1, 2, 3]
    assert kept_tensors("key", never)["tokens"].tolist() == [1, 2, 3]
    assert "cannot be used" in capsys.readouterr().out


# Made by one of many


def slowly_made(barrier, log: str, number: int, results) -> None:
    def make():
        with open(log, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.5)
        return {"maker": torch.tensor([number])}

    barrier.wait(60)
    results.put(kept_tensors(["the same", "key"], make)["maker"].item())


def test_processes_that_start_together_make_it_once(tmp_path):
    log, context = tmp_path / "makers", multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=slowly_made, args=(barrier, str(log), rank, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    got = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    (maker,) = log.read_text().split()
    assert got == [int(maker)] * 2


def test_after_a_failure_it_is_made_by_the_next_who_asks():
    with pytest.raises(AssertionError, match="made again"):
        kept_tensors("key", never)
    assert found_tensors("key") is None
    assert kept_tensors("key", lambda: THREE)["tokens"].tolist() == [1, 2, 3]


def test_a_half_written_file_is_never_read(monkeypatch, capsys):
    def half_of(tensors, file):
        whole(tensors, file)
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: len(content) // 2])
        raise OSError("No space left on device")

    whole = cache.save_file
    monkeypatch.setattr(cache, "save_file", half_of)
    for write in (lambda: keep_tensors("key", THREE), lambda: kept_tensors("key", lambda: THREE)):
        write()
        assert found_tensors("key") is None
    assert not list(Path(os.environ["RLHF_ENGINE_DATA_CACHE"]).glob("*.partial*"))
    assert "No space left on device" in capsys.readouterr().out
    monkeypatch.setattr(cache, "save_file", whole)
    assert kept_tensors("key", lambda: THREE)["tokens"].tolist() == [1, 2, 3]


# Keys

TEMPLATE = "{{ messages | map(attribute='content') | join(' ') }}"
TEXTS = [("a", "b"), ([user("a")], "b a")]


def with_another_word():
    tokenizer = word_tokenizer(template=TEMPLATE)
    tokenizer.add_tokens(["b!"])
    return tokenizer


def with_eos(token):
    tokenizer = word_tokenizer(template=TEMPLATE)
    tokenizer.eos_token = token
    return tokenizer


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [
        ([("a", "b"), ([user("a")], "b b")], word_tokenizer(template=TEMPLATE)),
        ([("a ", "b"), ([user("a")], "b a")], word_tokenizer(template=TEMPLATE)),
        ([("a", "b"), ("a", "b a")], word_tokenizer(template=TEMPLATE)),
        (TEXTS[::-1], word_tokenizer(template=TEMPLATE)),
        (TEXTS[:1], word_tokenizer(template=TEMPLATE)),
        (TEXTS, word_tokenizer(template=TEMPLATE + " ")),
        (TEXTS, word_tokenizer(template=TEMPLATE, adds_bos=True)),
        (TEXTS, word_tokenizer(template=TEMPLATE, adds_eos=True)),
        (TEXTS, with_another_word()),
        (TEXTS, with_eos("<s>")),
        (TEXTS, byte_tokenizer()),
    ],
    ids=["response", "prompt", "as text", "order", "fewer", "template", "BOS", "EOS", "token", "eos", "tokenizer"],
)
def test_another_text_or_tokenizer_is_tokenised_anew(texts, tokenizer, monkeypatch):
    places = [f"line {number}" for number in range(len(TEXTS))]
    encoded = []

    def counted(*args):
        encoded.append(args)
        return encode_exchange(*args)

    encode_exchange = exchanges.encode_exchange
    monkeypatch.setattr(exchanges, "encode_exchange", counted)
    tokenised(TEXTS, places, word_tokenizer(template=TEMPLATE))
    tokenised(TEXTS, ["elsewhere", "the same"], word_tokenizer(template=TEMPLATE))
    assert (len(encoded), len(files())) == (2, 1)
    tokenised(texts, places[: len(texts)], tokenizer)
    assert (len(encoded), len(files())) == (2 + len(texts), 2)


def test_a_tokenizer_has_the_same_digest_before_and_after_use():
    tokenizer = byte_tokenizer()
    before = digest_of_tokenizer(tokenizer)
    tokenizer(["some text", "text"], padding=True)
    assert digest_of_tokenizer(tokenizer) == before == digest_of_tokenizer(byte_tokenizer())


def test_a_tensors_digest_is_of_its_values():
    ids = torch.arange(6)
    assert digest_of(ids) == digest_of(ids.clone()) == digest_of(torch.arange(12)[::2] // 2)
    assert digest_of(ids.float()) != digest_of(ids) != digest_of(torch.tensor([0, 1, 2, 3, 5, 4]))
    assert digest_of(torch.empty(0)) != digest_of(ids)


def test_plain_data_has_one_digest_whatever_the_order_of_its_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
