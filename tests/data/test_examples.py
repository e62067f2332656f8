"""examples.py, create_datasets and create_eval_dataset: from files to minibatches that are the same on every rank."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from words import BOS, EOS, A, B, assistant, user, word_tokenizer

from engine.config import (
    DemonstrationDataConfig,
    DPOConfig,
    FrozenRoleConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    SFTConfig,
)
from engine.data import Examples, create_datasets, create_eval_dataset
from engine.data.exchanges import rows_of
from engine.data.sequences import Sequences
from engine.models.random_init import byte_tokenizer

TOKENIZER = byte_tokenizer()
MODEL = FrozenRoleConfig(model_name_or_path="some/model")
DEMONSTRATIONS = [{"prompt": f"p{number}", "response": f"r{number}"} for number in range(10)]
PREFERENCES = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}!"} for number in range(10)]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def written(tmp_path):
    """`written(rows)` -> the name of a file that holds them."""

    def write(rows, name="train") -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def sft(train, *, minibatch_size=4, epochs=1, iterations=None, seed=0, loss_on="response", **data) -> SFTConfig:
    return SFTConfig(
        model=MODEL,
        data=DemonstrationDataConfig(train=train, **data),
        output_dir="out",
        minibatch_size=minibatch_size,
        num_train_epochs=epochs,
        num_iterations=iterations,
        seed=seed,
        loss_on=loss_on,
    )


def reward_model(train, *, minibatch_size=4, seed=0, **data) -> RewardModelConfig:
    return RewardModelConfig(
        reward=MODEL,
        data=PreferenceDataConfig(train=train, **data),
        output_dir="out",
        minibatch_size=minibatch_size,
        seed=seed,
    )


def phase(config) -> int:
    return 1 if isinstance(config, SFTConfig) else 2


def loaded(config) -> Examples:
    """The training set, in the order of its files."""
    return create_datasets(config, TOKENIZER, phase(config))[0].dataset.examples


def texts(examples: Examples) -> list[tuple[str, str]]:
    return [(TOKENIZER.decode(prompt), TOKENIZER.decode(answer)) for prompt, answer in rows_of(examples.sequences)]


def prompts(examples: Examples) -> list[str]:
    """One per example."""
    return [prompt for prompt, _ in texts(examples)[:: examples.rows_per_example]]


# Columns


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "instruction"])
@pytest.mark.parametrize("response", ["response", "answer", "completion", "output"])
def test_the_usual_columns_of_demonstrations(written, prompt, response):
    examples = loaded(sft(written([{"other": "x", prompt: "2+2=", response: "4"}, {prompt: "a", response: ""}])))
    assert texts(examples) == [("2+2=", "4<eos>"), ("a", "<eos>")]
    assert (len(examples), examples.rows_per_example, examples.margins.tolist()) == (2, 1, [0, 0])


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "instruction"])
def test_the_usual_columns_of_preferences(written, prompt):
    rows = [{prompt: "a", "rejected": "no", "chosen": "yes"}, {prompt: "b", "rejected": "", "chosen": "c"}]
    examples = loaded(reward_model(written(rows)))
    assert texts(examples) == [("a", "yes<eos>"), ("a", "no<eos>"), ("b", "c<eos>"), ("b", "<eos>")]
    assert (len(examples), examples.rows_per_example, examples.margins.tolist()) == (2, 2, [0, 0])


def test_mapped_columns(written):
    row = {"prompt": "not this", "response": "nor this", "chosen": "nor this", "rejected": "no", "q": "a", "y": "b"}
    assert texts(loaded(sft(written([row]), prompt_column="q", response_column="y"))) == [("a", "b<eos>")]
    config = reward_model(written([row]), prompt_column="q", chosen_column="y", rejected_column="response")
    assert texts(loaded(config)) == [("a", "b<eos>"), ("a", "nor this<eos>")]


def test_dpo_reads_what_a_reward_model_reads(written):
    file = written(PREFERENCES)
    data = PreferenceDataConfig(train=file)
    assert loaded(DPOConfig(model=MODEL, data=data, output_dir="out")).digest == loaded(reward_model(file)).digest


@pytest.mark.parametrize(
    ("make", "rows", "columns", "said"),
    [
        (sft, DEMONSTRATIONS, dict(prompt_column="q"), r"no column q; its columns are prompt, response.*prompt_column"),
        (sft, DEMONSTRATIONS, dict(response_column="y"), r"no column y; its columns are prompt, r.*response_column"),
        (sft, [{"story": "a"}], {}, r"no column prompt / .* its columns are story.*--data\.prompt_column"),
        (reward_model, PREFERENCES, dict(prompt_column="q"), r"no column q; its columns are prompt, chosen, rejected"),
        (reward_model, PREFERENCES, dict(chosen_column="y"), r"no column y; .*--data\.chosen_column"),
        (reward_model, PREFERENCES, dict(margin_column="m"), r"no column m; .*--data\.margin_column"),
        (reward_model, [{"prompt": "a", "rejected": "b"}], {}, r"no column chosen; its columns are prompt, rejected"),
        (reward_model, [{"prompt": "a", "chosen": "b"}], {}, r"no column rejected; its columns are prompt, chosen"),
    ],
)
def test_a_missing_column_lists_those_there_are(written, make, rows, columns, said):
    with pytest.raises(ValueError, match=r"train\.jsonl has " + said):
        loaded(make(written(rows), **columns))


def test_a_missing_response_column_lists_those_there_are(written):
    with pytest.raises(ValueError, match=r"no column response / .*its columns are prompt, reply"):
        loaded(sft(written([{"prompt": "2+2=", "reply": "4"}])))


@pytest.mark.parametrize("bad", [None, 4, ["4"], {"text": "4"}])
@pytest.mark.parametrize(
    ("make", "rows", "column"),
    [
        (sft, DEMONSTRATIONS, "prompt"),
        (sft, DEMONSTRATIONS, "response"),
        (reward_model, PREFERENCES, "prompt"),
        (reward_model, PREFERENCES, "chosen"),
        (reward_model, PREFERENCES, "rejected"),
    ],
)
def test_a_cell_that_is_no_text_is_named_with_its_place_and_column(written, make, rows, column, bad):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2, column '{column}': a (prompt|response) is a string"):
        loaded(make(written([rows[0], {**rows[1], column: bad}])))


# Conversations


def turns(prompt: str) -> str:
    return f"user: {prompt}<eos>\nassistant: "


def test_conversations_need_no_response_column(written):
    rows = [
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    ]
    first = turns("a") + "b<eos>\n"
    assert texts(loaded(sft(written(rows)))) == [(turns("a"), "b<eos>"), (first + turns("c"), "d<eos>")]


def test_transcripts_need_no_prompt_column(written):
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"chosen": f"{before} yes", "rejected": f"{before} no"}]
    assert texts(loaded(reward_model(written(rows)))) == [(before, " yes<eos>"), (before, " no<eos>")]


def test_preferences_as_conversations_with_or_without_a_prompt(written):
    alone = {"chosen": [user("a"), assistant("yes")], "rejected": [user("a"), assistant("no")]}
    answers = {"prompt": [user("a")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    mixed = {"prompt": [user("a")], "chosen": "yes", "rejected": "no"}
    for row in (alone, answers, mixed, {"prompt": "a"} | alone):
        assert texts(loaded(reward_model(written([row])))) == [(turns("a"), "yes<eos>"), (turns("a"), "no<eos>")]


WHOLE = [user("a"), assistant("b"), user("c"), assistant("d")]


def test_a_conversation_with_an_answer_beside_a_response_column_is_refused(written):
    """Which of the two is to be learned, only the user knows."""
    rows = [{"messages": [user("a")], "answer": "b"}, {"messages": WHOLE, "answer": "e"}]
    said = r"line 2: column 'messages' ends .*'answer' holds .* --data\.response_column messages"
    with pytest.raises(ValueError, match=said):
        loaded(sft(written(rows)))
    asked = turns("a") + "b<eos>\n" + turns("c")
    assert texts(loaded(sft(written(rows[1:]), response_column="messages"))) == [(asked, "d<eos>")]


def test_a_conversation_is_the_response_to_the_first_of_its_questions(written):
    rows = [{"prompt": "a", "messages": WHOLE}]
    asked = turns("a") + "b<eos>\n" + turns("c")
    assert texts(loaded(sft(written(rows), response_column="messages"))) == [(asked, "d<eos>")]


@pytest.mark.parametrize("prompt", ["prompt", "messages"])
def test_an_answered_prompt_beside_preferences_is_refused(written, prompt):
    rows = [{prompt: "a", "chosen": "b", "rejected": "c"}, {prompt: WHOLE, "chosen": "e", "rejected": "f"}]
    with pytest.raises(ValueError, match=rf"line 2, column '{prompt}': the prompt ends with the assistant's turn"):
        loaded(reward_model(written(rows)))


def test_no_turn_of_a_prompt_gets_lost(written):
    rows = [
        {"prompt": [user("hi")], "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("no")]},
        {"prompt": [user("hi")], "chosen": [user("ho"), assistant("c")], "rejected": [user("ho"), assistant("no")]},
    ]
    rows[0]["rejected"] = [assistant("a"), user("b"), assistant("no")]
    asked = turns("hi") + "a<eos>\n" + turns("b")
    assert texts(loaded(reward_model(written(rows[:1])))) == [(asked, "c<eos>"), (asked, "no<eos>")]
    with pytest.raises(ValueError, match=r"line 2, column 'chosen': .*does not hold the prompt.*--data\.prompt_column"):
        loaded(reward_model(written(rows)))
    whole = loaded(reward_model(written(rows[1:]), prompt_column="chosen"))
    assert texts(whole) == [(turns("ho"), "c<eos>"), (turns("ho"), "no<eos>")]


# Alpaca

ALPACA = {"instruction": "add", "input": "2 2", "output": "4", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize("make", [sft, reward_model])
@pytest.mark.parametrize(
    ("changes", "prompt"),
    [({}, "add\n\n2 2"), (dict(input=""), "add"), (dict(input=None), "add"), (dict(instruction=""), "\n\n2 2")],
)
def test_the_input_of_an_instruction_belongs_to_it(written, make, changes, prompt):
    assert prompts(loaded(make(written([ALPACA | changes])))) == [prompt]


@pytest.mark.parametrize("make", [sft, reward_model])
def test_an_instruction_that_was_asked_for_is_taken_alone(written, make):
    assert prompts(loaded(make(written([ALPACA]), prompt_column="instruction"))) == ["add"]
    assert prompts(loaded(make(written([ALPACA | {"prompt": "mine"}])))) == ["mine"]
    rows = [{name.replace("instruction", "question"): cell for name, cell in ALPACA.items()}]
    assert prompts(loaded(make(written(rows)))) == ["add"]


@pytest.mark.parametrize("changes", [dict(input=7), dict(input=["x"]), dict(instruction=[user("a")])])
def test_an_input_that_cannot_be_joined_is_named_with_its_place(written, changes):
    with pytest.raises(ValueError, match=r"line 2: instruction and input make one prompt.*--data\.prompt_column"):
        loaded(sft(written([ALPACA, ALPACA | changes])))


@pytest.mark.parametrize("make", [sft, reward_model])
def test_a_string_is_what_the_user_says_under_chat(written, make):
    row = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}
    assert texts(loaded(make(written([row]), prompt_format="chat")))[0] == (turns("a"), "b<eos>")
    assert texts(loaded(make(written([row]), prompt_format="text")))[0] == ("a", "b<eos>")


# What is learned


def test_the_loss_on_the_sequence_leaves_out_only_the_first_token(written):
    rows = [{"prompt": "abc", "response": "de"}, {"prompt": "a", "response": ""}, {"prompt": "long", "response": "de"}]
    examples = loaded(sft(written(rows), loss_on="sequence", max_prompt_tokens=3, max_length=6))
    assert texts(examples) == [("a", "bcde<eos>"), ("a", "<eos>")]  # the limit is of the prompt that the row has


def test_margins_follow_their_pairs(written):
    margins = [0.5, -1, 2, 0]
    rows = [row | {"by": margin} for row, margin in zip(PREFERENCES, margins, strict=False)]
    rows[2]["chosen"] = rows[2]["rejected"]
    examples = loaded(reward_model(written(rows), margin_column="by"))
    assert prompts(examples) == ["p0", "p1", "p3"]
    assert examples.margins.tolist() == [0.5, -1, 0] and examples.margins.dtype == torch.float32


@pytest.mark.parametrize(
    "bad", ["one", "", "nan", "inf", None, True, float("nan"), [1], pytest.param(10**400, id="huge")]
)
def test_a_margin_that_is_no_number_is_named_with_its_place(written, bad):
    rows = [row | {"by": margin} for row, margin in zip(PREFERENCES, [1, bad], strict=False)]
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2, column 'by': a margin is a number"):
        loaded(reward_model(written(rows), margin_column="by"))


def test_a_csv_file_gives_margins_and_responses_of_digits(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("prompt,chosen,rejected,by\n2+2=,4,007,0.5\na,None,NA,-1\n")
    examples = loaded(reward_model(str(path), margin_column="by"))
    assert [text for _, text in texts(examples)] == ["4<eos>", "007<eos>", "None<eos>", "NA<eos>"]
    assert examples.margins.tolist() == [0.5, -1]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), 1e300])
def test_a_margin_that_is_not_finite_is_refused(written, bad):
    with pytest.raises(ValueError, match="a margin is a number"):
        loaded(reward_model(written([PREFERENCES[0] | {"by": bad}]), margin_column="by"))


def test_pairs_of_equal_responses_are_dropped_and_counted(written, capsys):
    rows = [dict(row) for row in PREFERENCES[:4]]
    for number in (0, 2):
        rows[number]["rejected"] = rows[number]["chosen"]
    examples = loaded(reward_model(written(rows)))
    assert texts(examples) == [("p1", "c1<eos>"), ("p1", "r1!<eos>"), ("p3", "c3<eos>"), ("p3", "r3!<eos>")]
    assert "2 of 4 pairs of" in (said := capsys.readouterr().out) and "chosen == rejected: dropped" in said


def test_nothing_but_equal_responses_is_refused(written):
    with pytest.raises(ValueError, match=r"2 of 2 pairs of .*train\.jsonl have chosen == rejected.*nothing"):
        loaded(reward_model(written([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2)))


def test_pairs_that_only_differ_in_what_is_cut_off_are_equal(written, capsys):
    rows = [{"prompt": "a", "chosen": "same, yes", "rejected": "same, no"}, PREFERENCES[0]]
    examples = loaded(reward_model(written(rows), max_length=5, over_length="truncate_right"))
    assert prompts(examples) == ["p0"]
    assert "1 of 2 pairs" in capsys.readouterr().out


def test_pairs_that_answer_two_prompts_are_dropped_and_counted(written, capsys):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: yes"}
    fine = {"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: a\n\nAssistant: no"}
    examples = loaded(reward_model(written([row, fine])))
    assert [text for _, text in texts(examples)] == [" yes<eos>", " no<eos>"]
    assert "1 of 2 pairs" in (said := capsys.readouterr().out) and "answer two different prompts: dropped" in said
    with pytest.raises(ValueError, match=r"1 of 1 pairs .* answer two different prompts"):
        loaded(reward_model(written([row])))


# Too long: rows of 2 + 3 ("p0" + "r0<eos>"), of a prompt of 6, and of 2 + 9

LONG = [DEMONSTRATIONS[0], {"prompt": "longer", "response": "r"}, {"prompt": "p2", "response": "a longer"}]


def test_rows_that_are_too_long_are_dropped_and_counted(written, capsys):
    examples = loaded(sft(written(LONG), max_prompt_tokens=5, max_length=10))
    assert texts(examples) == [("p0", "r0<eos>")]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("2 of 3 rows of")
    assert said.endswith("train.jsonl exceed data.max_prompt_tokens=5 or data.max_length=10: dropped.")
    assert len(loaded(sft(written(LONG), max_prompt_tokens=6, max_length=11))) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("over_length", "cut"),
    [
        ("truncate_left", [("onger", "r<eos>"), ("2", "a longer<eos>")]),
        ("truncate_right", [("longe", "r<eos>"), ("p2", "a longer")]),
    ],
)
def test_rows_that_are_too_long_are_shortened_and_counted(written, capsys, over_length, cut):
    examples = loaded(sft(written(LONG), max_prompt_tokens=5, max_length=10, over_length=over_length))
    assert texts(examples) == [("p0", "r0<eos>"), *cut]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("2 of 3 rows of") and said.endswith(f": shortened ({over_length}).")


@pytest.mark.parametrize(("limits", "line"), [(dict(max_prompt_tokens=5), 2), (dict(max_length=10), 3)])
def test_an_error_names_the_first_row_that_is_too_long(written, limits, line):
    with pytest.raises(ValueError, match=rf"1 of 3 rows of .*first at .*train\.jsonl, line {line}"):
        loaded(sft(written(LONG), over_length="error", **limits))


def test_dropping_everything_is_refused(written):
    with pytest.raises(ValueError, match=r"3 of 3 rows of .* leaves nothing"):
        loaded(sft(written(LONG), max_length=2))


@pytest.mark.parametrize("limits", [dict(max_prompt_tokens=20), dict(max_length=21)])
def test_a_conversation_does_not_lose_the_turn_that_is_asked_for(written, limits):
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": [user("much too long"), assistant("b")]}]
    with pytest.raises(ValueError, match=r"line 2: the prompt is a conversation .*truncate_right would cut off"):
        loaded(sft(written(rows), over_length="truncate_right", **dict(max_length=60) | limits))
    cut = loaded(sft(written(rows), over_length="truncate_left", **dict(max_length=60) | limits))
    assert prompts(cut)[1].endswith("\nassistant: ")
    transcript = {"chosen": "\n\nHuman: long\n\nAssistant: b", "rejected": "\n\nHuman: long\n\nAssistant: c"}
    with pytest.raises(ValueError, match=r"line 1: the prompt is a conversation"):
        loaded(reward_model(written([transcript]), over_length="truncate_right", **limits))


def test_a_conversations_response_may_lose_its_end(written):
    rows = [{"messages": [user("a"), assistant("a long response")]}]
    ((prompt, response),) = texts(loaded(sft(written(rows), over_length="truncate_right", max_length=25)))
    assert prompt == turns("a") and "a long response".startswith(response)


def test_a_shortened_prompt_keeps_its_bos(written):
    tokenizer = word_tokenizer(adds_bos=True)
    file = written([{"prompt": "a b a b", "response": "a"}])
    for over_length, ids in (("truncate_left", [BOS, A, B]), ("truncate_right", [BOS, A, B])):
        config = sft(file, over_length=over_length, max_prompt_tokens=3)
        ((prompt, response),) = rows_of(create_datasets(config, tokenizer, 1)[0].dataset.examples.sequences)
        assert (prompt, response) == (ids, [A, EOS])


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_goes_as_a_whole(written, capsys, long):
    rows = [PREFERENCES[0], PREFERENCES[1] | {long: "much too long"}, PREFERENCES[2]]
    assert prompts(loaded(reward_model(written(rows), max_length=8))) == ["p0", "p2"]
    assert "1 of 3 pairs" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"first at .*line 2"):
        loaded(reward_model(written(rows), max_length=8, over_length="error"))


def test_only_rank_0_speaks(written, capsys, monkeypatch):
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    too_long = PREFERENCES[2] | {"chosen": "x" * 9}
    config = reward_model(
        [written([*PREFERENCES, equal], "one"), written([*PREFERENCES[:2], too_long], "two")],
        weights=[1, 1],
        max_length=8,
        eval=written([PREFERENCES[0], {"prompt": "new", "chosen": "b", "rejected": "c"}, equal], "held_out"),
    )
    loaded(config)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in said] == [
        "1 of 11 pairs of ",
        "1 of 3 pairs of ",
        "2 of 10 rows of ",
        "2 of 2 rows of ",
        "1 of 3 pairs of ",
        "Warning: 1 of 2 prompts of ",
    ]
    assert create_eval_dataset(config, TOKENIZER, 2) is not None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded(config)
    assert capsys.readouterr().out == ""


# Several sources


def test_several_sources_lie_end_to_end_each_with_its_own_columns(written):
    sources = [written(DEMONSTRATIONS[:2], "one"), written([{"question": "a", "answer": "b"}], "two")]
    assert texts(loaded(sft(sources))) == [("p0", "r0<eos>"), ("p1", "r1<eos>"), ("a", "b<eos>")]
    assert len(loaded(sft(sources, max_samples=1))) == 2


def test_weights_are_shares_of_the_rows_in_use(written, capsys):
    """Of 10 + 3 rows one of the three is dropped, and 1 : 1 of what is left are 2 + 2."""
    others = [{"prompt": f"other{number}", "response": "x" * (1 + 90 * (number == 1))} for number in range(3)]
    config = sft([written(DEMONSTRATIONS, "one"), written(others, "two")], weights=[1, 1], max_length=50)
    used = prompts(loaded(config))
    assert used[2:] == ["other0", "other2"]
    assert len(set(used[:2])) == 2 and set(used[:2]) <= {row["prompt"] for row in DEMONSTRATIONS}
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("2 of 10 rows of") and said[2].startswith("2 of 2 rows of")
    assert prompts(loaded(config)) == used
    assert len({str(prompts(loaded(replace(config, seed=seed)))) for seed in range(4)}) > 1


# Held out


@pytest.mark.parametrize(("make", "rows"), [(sft, DEMONSTRATIONS), (reward_model, PREFERENCES)])
def test_nothing_is_held_out_unless_asked(written, make, rows):
    config = make(written(rows))
    assert create_eval_dataset(config, TOKENIZER, phase(config)) is None
    assert len(loaded(config)) == 10


@pytest.mark.parametrize(("make", "rows"), [(sft, DEMONSTRATIONS), (reward_model, PREFERENCES)])
def test_what_is_held_out_is_not_trained_on_and_is_the_same_on_every_rank(written, monkeypatch, make, rows):
    config = make(written(rows), eval_fraction=0.3)

    def parts(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return loaded(config), create_eval_dataset(config, TOKENIZER, phase(config))

    train, held_out = parts(0)
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(prompts(train) + prompts(held_out)) == [f"p{number}" for number in range(10)]
    assert [part.digest for part in parts(1)] == [train.digest, held_out.digest]
    answers = [text for _, text in texts(held_out)]
    assert all(
        prompt[1:] in answer for prompt, answer in zip(prompts(held_out), answers[:: phase(config)], strict=True)
    )
    others = [create_eval_dataset(replace(config, seed=seed), TOKENIZER, phase(config)).digest for seed in range(5)]
    assert len(set(others)) > 1


@pytest.mark.parametrize(("make", "rows"), [(sft, DEMONSTRATIONS), (reward_model, PREFERENCES)])
def test_an_eval_file_is_evaluated_and_every_row_is_trained_on(written, make, rows):
    config = make(written(rows[:8]), eval=written(rows[8:], "held_out"), max_length=20)
    assert prompts(loaded(config)) == [f"p{number}" for number in range(8)]
    held_out = create_eval_dataset(config, TOKENIZER, phase(config))
    assert prompts(held_out) == ["p8", "p9"]
    assert held_out.rows_per_example == phase(config)


def test_an_eval_file_is_held_to_the_same_rules(written):
    config = sft(written(DEMONSTRATIONS), eval=written([{"prompt": "a", "response": 4}], "held_out"))
    with pytest.raises(ValueError, match=r"held_out\.jsonl, line 1, column 'response'"):
        create_eval_dataset(config, TOKENIZER, 1)
    config = sft(written(DEMONSTRATIONS), eval=written(LONG, "held_out"), max_prompt_tokens=5, loss_on="sequence")
    assert texts(create_eval_dataset(config, TOKENIZER, 1)) == [("p", "0r0<eos>"), ("p", "2a longer<eos>")]


@pytest.mark.parametrize("loss_on", ["response", "sequence"])
def test_what_is_held_out_and_trained_on_is_counted(written, capsys, loss_on):
    """p1 and p2 are asked in both, p2 with the same answer."""
    held_out = [{"prompt": f"p{number}", "response": f"r{number // 2 * 2}"} for number in (1, 2, 1)]
    held_out.append({"prompt": "new", "response": "r1"})
    loaded(sft(written(DEMONSTRATIONS), eval=written(held_out, "held_out"), loss_on=loss_on))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("Warning: 2 of 3 prompts of") and "held_out.jsonl (data.eval)" in said


@pytest.mark.parametrize(("make", "rows"), [(sft, DEMONSTRATIONS), (reward_model, PREFERENCES)])
def test_holding_out_what_is_trained_on_is_refused(written, tmp_path, make, rows):
    file = written(rows)
    with pytest.raises(ValueError, match=r"data\.eval=.*train\.jsonl: all of its 10 rows .*--data\.eval_fraction"):
        loaded(make(file, eval=file))
    held_out = written([rows[3], rows[1], rows[3]], "held_out")
    for train in (file, str(tmp_path)):  # the file, and the folder that both are in
        with pytest.raises(ValueError, match=r"held_out\.jsonl: all of its 3 rows"):
            loaded(make(train, eval=held_out))


def test_other_answers_to_the_same_prompts_are_held_out_with_a_warning(written, capsys):
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PREFERENCES]
    loaded(reward_model(written(PREFERENCES), eval=written(swapped, "held_out")))
    assert capsys.readouterr().out.startswith("Warning: 10 of 10 prompts of")


def test_what_is_held_out_is_read_without_what_is_trained_on(written, tmp_path):
    config = sft(written(DEMONSTRATIONS), eval=written([{"prompt": "a", "response": "b"}], "held_out"))
    (tmp_path / "train.jsonl").unlink()
    assert texts(create_eval_dataset(config, TOKENIZER, 1)) == [("a", "b<eos>")]
    assert create_eval_dataset(replace(config, data=replace(config.data, eval=None)), TOKENIZER, 1) is None


@pytest.mark.parametrize("train_phase", [0, 4, "1", None])
def test_only_phases_1_to_3_hold_something_out(written, train_phase):
    with pytest.raises(ValueError, match="train_phase="):
        create_eval_dataset(sft(written(DEMONSTRATIONS)), TOKENIZER, train_phase)


# Minibatches


@pytest.mark.parametrize(
    ("settings", "total"),
    [({}, 3), (dict(epochs=3), 9), (dict(epochs=3, iterations=5), 5), (dict(minibatch_size=10), 1)],
)
def test_the_number_of_iterations(written, settings, total):
    loader, num_total_iters = create_datasets(sft(written(DEMONSTRATIONS), **settings), TOKENIZER, 1)
    assert num_total_iters == total
    assert len(loader) == (1 if "minibatch_size" in settings else 3)


def minibatches(config, rank=0, world_size=1, *, epochs=1, monkeypatch) -> list[list[list[tuple[str, str]]]]:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    loader, _ = create_datasets(config, TOKENIZER, phase(config))
    return [[texts(batch) for batch in loader] for _ in range(epochs)]


@pytest.mark.parametrize(("make", "rows"), [(sft, DEMONSTRATIONS), (reward_model, PREFERENCES)])
def test_every_rank_has_the_same_minibatches_with_every_row_once(written, monkeypatch, make, rows):
    config = make(written(rows))
    alone = minibatches(config, epochs=2, monkeypatch=monkeypatch)
    assert minibatches(config, 0, 2, epochs=2, monkeypatch=monkeypatch) == alone
    assert minibatches(config, 1, 2, epochs=2, monkeypatch=monkeypatch) == alone
    for epoch in alone:
        assert [len(batch) for batch in epoch] == [size * phase(config) for size in (4, 4, 2)]
        assert sorted(row for batch in epoch for row in batch) == sorted(texts(loaded(config)))
    assert alone[0] != alone[1]
    assert minibatches(replace(config, seed=1), epochs=2, monkeypatch=monkeypatch) != alone


def test_a_minibatch_keeps_pairs_together(written, monkeypatch):
    ((*batches,),) = minibatches(reward_model(written(PREFERENCES)), monkeypatch=monkeypatch)
    for batch in batches:
        for (prompt, chosen), (same_prompt, rejected) in zip(batch[::2], batch[1::2], strict=True):
            assert prompt == same_prompt
            assert (chosen, rejected) == (f"c{prompt[1:]}<eos>", f"r{prompt[1:]}!<eos>")


def test_a_namespace_does_for_a_config(written):
    args = SimpleNamespace(
        data=PreferenceDataConfig(train=written(PREFERENCES)),
        minibatch_size=5,
        seed=0,
        num_iterations=None,
        num_train_epochs=1,
    )
    loader, total = create_datasets(args, TOKENIZER, 2)
    assert (total, [len(batch) for batch in loader]) == (2, [5, 5])


# Examples


def pairs(ref_logprobs=True) -> Examples:
    """Example e's rows have the tokens 10e + 1, 10e + 2 (chosen) and 10e + 1, 10e + 3, 10e + 3 (rejected)."""
    return Examples(
        sequences=Sequences.of(
            [[10 * number + 1] for number in range(4) for _ in "ab"],
            [[10 * number + 2 + row] * (1 + row) for number in range(4) for row in range(2)],
        ),
        rows_per_example=2,
        margins=torch.arange(4.0),
        ref_logprobs=-torch.arange(8.0) if ref_logprobs else None,
    )


def test_picking_examples_picks_all_that_belongs_to_them():
    picked = pairs()[torch.tensor([2, 0, 2])]
    assert picked.sequences.tokens.tolist() == [21, 22, 21, 23, 23, 1, 2, 1, 3, 3, 21, 22, 21, 23, 23]
    assert picked.sequences.response_lengths.tolist() == [1, 2] * 3
    assert picked.margins.tolist() == [2, 0, 2]
    assert picked.ref_logprobs.tolist() == [-4, -5, 0, -1, -4, -5]
    assert (len(picked), picked.rows_per_example) == (3, 2)
    assert pairs(ref_logprobs=False)[torch.tensor([1])].ref_logprobs is None
    assert len(pairs()[torch.empty(0, dtype=torch.int64)]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(margins=torch.zeros(3)), r"8 sequences and margins \(3,\); 6 were expected"),
        (dict(margins=torch.zeros(8)), r"8 sequences and margins \(8,\); 16 were expected"),
        (dict(margins=torch.zeros(4, 1)), r"margins \(4, 1\)"),
        (dict(rows_per_example=1), r"8 sequences and margins \(4,\); 4 were expected"),
        (dict(ref_logprobs=torch.zeros(4)), r"ref_logprobs has shape \(4,\), must be \(8,\)"),
        (dict(ref_logprobs=torch.zeros(4, 2)), r"ref_logprobs has shape \(4, 2\), must be \(8,\)"),
    ],
)
def test_examples_of_another_shape_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(pairs(), **changes)


def changed_sequences(**changes) -> Examples:
    return replace(pairs(), sequences=replace(pairs().sequences, **changes))


def one_other(tensor, at) -> torch.Tensor:
    other = tensor.clone()
    other[at] += 1
    return other


@pytest.mark.parametrize(
    "other",
    [
        lambda: changed_sequences(tokens=one_other(pairs().sequences.tokens, 0)),
        lambda: changed_sequences(tokens=one_other(pairs().sequences.tokens, -1)),
        lambda: changed_sequences(
            prompt_lengths=torch.tensor([2] + [1] * 7), response_lengths=torch.tensor([0, 2] + [1, 2] * 3)
        ),
        lambda: replace(pairs(), margins=one_other(torch.arange(4.0), 3)),
        lambda: pairs()[torch.tensor([1, 0, 2, 3])],
        lambda: pairs()[torch.tensor([0, 1, 2])],
    ],
    ids=["first token", "last token", "boundary", "margin", "order", "fewer"],
)
def test_the_digest_sees_one_token_that_differs(other):
    assert other().digest != pairs().digest


def test_the_digest_is_of_the_values():
    assert pairs().digest == pairs().digest == pairs()[torch.arange(4)].digest == pairs(ref_logprobs=False).digest


@pytest.mark.parametrize("loss_on", ["response", "sequence"])
def test_no_prompt_is_on_both_sides_of_a_split(written, loss_on):
    """Five answers to each of eight questions: were rows split, the held-out ones would ask what was trained on."""
    rows = [{"prompt": f"q{number % 8}", "response": f"{number}"} for number in range(40)]
    config = sft(written(rows), eval_fraction=0.25, loss_on=loss_on)
    train, held_out = loaded(config), create_eval_dataset(config, TOKENIZER, 1)
    asked = [{(prompt + answer)[:2] for prompt, answer in texts(part)} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (30, 10)
    assert not asked[0] & asked[1] and len(asked[1]) == 2
