"""A file of prompts in, a file of responses out."""

import json

import pytest
import tiny
import torch
from reciting import BYTE, MANY_EOS, generated, lines_of, reciting, stirred
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.answering.answerer import Answerer
from engine.answering.batch import as_line
from engine.data.formatting import encode, render

LENGTH = ("--max_response_tokens", "12")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    return stirred(tiny.MODELS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_prompts(tmp_path)


def written(tmp_path, *flags, name="answers.jsonl"):
    """The lines that a run writes."""
    assert generated(*LENGTH, "--output", tmp_path / name, *flags) is None
    return lines_of(tmp_path / name)


def test_greedy_responses_are_those_of_transformers(tmp_path, model, prompts):
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    rule = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=MANY_EOS, pad_token_id=0)
    lines = written(tmp_path, "--model", model, "--prompts", prompts, "--temperature", "0", "--batch_size", "3")
    assert [line["prompt"] for line in lines] == tiny.PROMPTS
    for line, prompt in zip(lines, tiny.PROMPTS, strict=True):
        ids = torch.tensor([BYTE(prompt)["input_ids"]])
        response = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=rule)[0, ids.shape[1] :]
        assert line["response"] == BYTE.decode(response, skip_special_tokens=True)
        assert (line["tokens"], line["finished"]) == (len(response), response[-1].item() in MANY_EOS)
    assert {line["finished"] for line in lines} == {True, False}, "or the test has shown half of it"


def test_the_seed_alone_decides_what_is_drawn(tmp_path, model, prompts):
    """And not what is decoded next to a row, or how many rows were left out before it."""
    given = ("--model", model, "--prompts", prompts)
    one, three, all_at_once = (written(tmp_path, *given, "--batch_size", size) for size in ("1", "3", "100"))
    assert one == three == all_at_once
    assert written(tmp_path, *given, "--seed", "1") != one
    left = written(tmp_path, *given, "--max_prompt_tokens", "9", "--over_length", "drop")
    assert left == [line for line in one if len(line["prompt"]) <= 9]
    assert 0 < len(left) < len(one)


def test_the_filters_arrive(tmp_path, model, prompts):
    given = ("--model", model, "--prompts", prompts)
    likeliest = written(tmp_path, *given, "--temperature", "0")
    assert written(tmp_path, *given, "--top_k", "1") == likeliest
    assert written(tmp_path, *given, "--top_p", "1e-6") == likeliest
    assert written(tmp_path, *given) != likeliest


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    return reciting(tmp_path_factory.mktemp("reciter"), "né日🙂!")


def test_a_line_has_the_answer_and_the_rows_other_columns(tmp_path, reciter):
    conversation = [{"role": "user", "content": "hi"}]
    rows = [
        {"id": 7, "question": "a ", "response": "the file's own", "more": {"x": [1, None]}},
        {"question": [*conversation, {"role": "assistant", "content": "an answer that is cut off"}]},
    ]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    first, second = written(tmp_path, "--model", reciter, "--prompts", path, "--temperature", "0")
    answer = {"response": "né日🙂!", "finished": True, "tokens": 12}
    own = {"id": 7, "given_response": "the file's own", "more": {"x": [1, None]}}
    assert first == {"prompt": "a ", **answer, **own}
    assert second == {"prompt": conversation, **answer}
    assert list(first)[:4] == ["prompt", "response", "finished", "tokens"]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_every_kind_of_file_that_training_reads(tmp_path, reciter, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("instruction,input,n\nadd,1 and 2 ,x\n")
    elif kind == "json":
        path.write_text(json.dumps([{"instruction": "add", "input": "1 and 2 ", "n": "x"}]))
    else:
        from datasets import Dataset

        Dataset.from_list([{"instruction": "add", "input": "1 and 2 ", "n": "x"}]).to_parquet(path)
    (line,) = written(tmp_path, "--model", reciter, "--prompts", path, "--temperature", "0")
    assert (line["prompt"], line["response"], line["n"]) == ("add\n\n1 and 2 ", "né日🙂!", "x")


def test_a_line_is_json_whatever_a_row_holds():
    from datetime import date

    line = as_line({"x": [float("nan"), {"y": float("inf")}], "day": date(2026, 1, 2), "response": "é", "prompt": "p"})
    assert line == '{"prompt": "p", "response": "é", "x": [null, {"y": null}], "day": "2026-01-02"}\n'


def prompts_read(monkeypatch) -> list[str]:
    """What the model is given, from now on."""
    read, plain = [], Answerer.answers

    def answers(self, prompts, keys, **given):
        read.extend(self.tokenizer.decode(prompt) for prompt in prompts)
        return plain(self, prompts, keys, **given)

    monkeypatch.setattr(Answerer, "answers", answers)
    return read


def test_prompts_are_rendered_as_in_training(tmp_path, reciter, monkeypatch):
    own = [{"role": "system", "content": "its own"}, {"role": "user", "content": "x"}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"prompt": own}])
    read, given = prompts_read(monkeypatch), ("--model", reciter, "--prompts", path)
    written(tmp_path, *given)
    written(tmp_path, *given, "--prompt_format", "chat")
    written(tmp_path, *given, "--system", "be short")
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    written(tmp_path, *given, "--prompt_format", "chat", "--chat_template", template)
    asked = "user: x<eos>\nassistant: "
    with_own = render(own, BYTE)
    assert read == ["x", with_own, asked, with_own, f"system: be short<eos>\n{asked}", with_own, "[x]", "[its own][x]"]
    assert BYTE.decode(encode(with_own, BYTE)) == with_own


def test_a_too_long_prompt_is_treated_as_told(tmp_path, reciter, monkeypatch):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "abcdef"}, {"prompt": "x"}])
    read, given = prompts_read(monkeypatch), ("--model", reciter, "--prompts", path, "--max_prompt_tokens", "3")
    written(tmp_path, *given, "--over_length", "truncate_left")
    written(tmp_path, *given, "--over_length", "truncate_right")
    written(tmp_path, *given, "--over_length", "drop")
    assert read == ["def", "x", "abc", "x", "x"]
    assert generated("--output", tmp_path / "no.jsonl", *given) == (
        f"ValueError: 1 of 2 prompts of {path} exceed 3 tokens, first at {path}, line 1, column 'prompt'. Raise "
        f"--max_prompt_tokens, lower --max_response_tokens, or choose another --over_length."
    )
    assert not (tmp_path / "no.jsonl").exists()


def test_whole_batches_lie_in_the_file_while_others_are_written(tmp_path, reciter, prompts, monkeypatch):
    """Ctrl-C in the third batch: the first two are there, each line whole, and the exit code is a shell's for it."""
    whole, sizes, plain = written(tmp_path, "--model", reciter, "--prompts", prompts), [], Answerer.answers

    def answers(self, *args, **given):
        sizes.append(len(lines_of(tmp_path / "cut.jsonl")))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **given)

    monkeypatch.setattr(Answerer, "answers", answers)
    given = (*LENGTH, "--model", reciter, "--prompts", prompts, "--batch_size", "2")
    assert generated(*given, "--output", tmp_path / "cut.jsonl") == 130
    assert sizes == [0, 2, 4]
    assert lines_of(tmp_path / "cut.jsonl") == whole[:4]


def test_an_earlier_file_is_kept(tmp_path, reciter, prompts, capsys):
    first = written(tmp_path, "--model", reciter, "--prompts", prompts)
    second = written(tmp_path, "--model", reciter, "--prompts", prompts, "--seed", "1")
    assert lines_of(tmp_path / "answers.previous.jsonl") == first != second
    assert "answers.previous.jsonl" in capsys.readouterr().err


def test_two_models_side_by_side(tmp_path, model, reciter, prompts, capsys):
    """Each line has what either writes alone; a prompt that is too long for one is left out for both."""
    alone = {name: written(tmp_path, "--model", name, "--prompts", prompts) for name in (model, reciter)}
    both = written(tmp_path, "--model", model, "--other", reciter, "--prompts", prompts, "--batch_size", "3")
    assert len(both) == len(tiny.PROMPTS)
    for line, one, other in zip(both, alone[model], alone[reciter], strict=True):
        assert line == one | {f"other_{name}": other[name] for name in ("response", "finished", "tokens")}
    assert generated("--model", model, "--other", reciter, "--prompts", prompts, "--output", tmp_path / "usual") is None
    assert "the others after 256 or 128 tokens (max_response_tokens)" in capsys.readouterr().err
    long = tiny.write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 250}, {"prompt": "y"}])
    lines = written(tmp_path, "--model", model, "--other", reciter, "--prompts", long, "--over_length", "drop")
    assert [line["prompt"] for line in lines] == ["y"], "the second model was made for 256 tokens"
