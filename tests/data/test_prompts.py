"""prompts.py and create_datasets: over-length policies, and batches that do not depend on the number of ranks."""

import json
from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from words import BOS, A, B, assistant, user, word_tokenizer

from engine.config import DataConfig
from engine.data import PromptBatch, create_datasets
from engine.data.prompts import GlobalBatches, PromptDataset, create_prompt_dataloader
from engine.data.sources import Source
from engine.models.random_init import byte_tokenizer


def dataset(*texts, tokenizer=None) -> PromptDataset:
    rows = [{"prompt": text, "number": number} for number, text in enumerate(texts)]
    source = Source("mine.jsonl", rows, [f"mine.jsonl, line {number}" for number in range(1, len(rows) + 1)])
    return PromptDataset([source], tokenizer or byte_tokenizer())


def args(tmp_path, texts, *, per_iteration=4, iterations=None, epochs=1, seed=0, **data):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return SimpleNamespace(
        data=DataConfig(train=str(path), **data),
        rollout=SimpleNamespace(environment=None),
        prompts_per_iteration=per_iteration,
        num_iterations=iterations,
        num_train_epochs=epochs,
        seed=seed,
    )


def joined(lists) -> list:
    return list(chain.from_iterable(lists))


def texts_of(tokens) -> list[str]:
    return [byte_tokenizer().decode(ids) for ids in tokens]


# Rows


@pytest.mark.parametrize("bad", [None, 5, ["a"], {"role": "user"}])
def test_a_prompt_that_is_no_text_is_named_with_its_place_and_column(bad):
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2, column 'prompt': a prompt is a string"):
        dataset("fine", bad)


def test_a_row_without_the_column_is_named_with_its_place():
    source = Source("mine.jsonl", [{"prompt": "a"}, {"promt": "b"}], ["mine.jsonl, line 1", "mine.jsonl, line 9"])
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 9, column 'prompt'"):
        PromptDataset([source], byte_tokenizer())


def test_an_empty_prompt_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 3, column 'prompt': the prompt is empty"):
        dataset("a", "b", "")


def test_messages_without_a_template_are_named_with_their_place():
    without_template = byte_tokenizer()
    without_template.chat_template = None
    with pytest.raises(ValueError, match=r"line 1, column 'prompt': .*chat template"):
        dataset([{"role": "user", "content": "hi"}], tokenizer=without_template)


# Too long


def test_nothing_is_said_when_every_prompt_fits():
    prompts = dataset("abc", "de")
    assert prompts.limit_length(3, "error") is None
    assert prompts.batch([0, 1]).texts == ["abc", "de"]


def test_drop_leaves_the_others_and_says_how_many_went():
    prompts = dataset("abcd", "ab", "abcdef", "abc")
    said = prompts.limit_length(3, "drop")
    assert "2 of 4 prompts of mine.jsonl exceed 3 tokens" in said and "dropped" in said
    assert [prompts[index] for index in range(len(prompts))] == [1, 3]


def test_drop_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"2 of 2 prompts.*leaves nothing.*--data\.max_prompt_tokens"):
        dataset("abcd", "abcde").limit_length(3, "drop")


def test_error_names_the_count_and_the_first_place():
    with pytest.raises(
        ValueError, match=r"2 of 4 prompts of mine\.jsonl exceed 3 tokens, first at mine\.jsonl, line 2"
    ):
        dataset("ab", "abcd", "a", "abcdef").limit_length(3, "error")


@pytest.mark.parametrize(("policy", "kept"), [("truncate_left", ["ab", "def"]), ("truncate_right", ["ab", "abc"])])
def test_truncation_keeps_one_end_and_says_how_many_were_cut(policy, kept):
    prompts = dataset("ab", "abcdef")
    said = prompts.limit_length(3, policy)
    assert "1 of 2 prompts" in said and policy in said
    batch = prompts.batch([0, 1])
    assert texts_of(batch.tokens) == kept
    assert len(prompts) == 2


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
def test_a_score_function_sees_the_prompt_that_the_model_saw(policy):
    prompts = dataset("abcdef")
    prompts.limit_length(3, policy)
    batch = prompts.batch([0])
    assert batch.texts == texts_of(batch.tokens)


@pytest.mark.parametrize(
    ("policy", "tokens", "text"),
    [("truncate_left", [BOS, B, A], "b a"), ("truncate_right", [BOS, A, B], "a b")],
)
def test_a_shortened_prompt_keeps_its_bos_and_its_text_has_none(policy, tokens, text):
    prompts = dataset("a b a b a", "b a", tokenizer=word_tokenizer(adds_bos=True))
    prompts.limit_length(3, policy)
    batch = prompts.batch([0, 1])
    assert (batch.tokens, batch.texts) == ([tokens, [BOS, B, A]], [text, "b a"])


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_shortened_prompt_has_the_bos_that_its_template_wrote(adds_bos):
    tokenizer = word_tokenizer(adds_bos=adds_bos, template="<s> {{ messages[0]['content'] }}")
    prompts = dataset([user("a b a b a")], [user("a")], tokenizer=tokenizer)
    prompts.limit_length(3, "truncate_left")
    assert prompts.batch([0, 1]).texts == ["<s> b a", "<s> a"]


def test_a_mark_in_the_middle_of_a_text_stays_in_it():
    prompts = dataset("a b <s> a", tokenizer=word_tokenizer())
    prompts.limit_length(2, "truncate_left")
    assert (prompts.batch([0]).tokens, prompts.batch([0]).texts) == ([[BOS, A]], ["<s> a"])


@pytest.mark.parametrize("prompt", [[user("hi")], "\n\nHuman: hi\n\nAssistant:"])
def test_a_conversation_does_not_lose_the_turn_that_is_asked_for(prompt):
    with pytest.raises(ValueError, match=r"line 2, column 'prompt': the prompt is a conversation.*truncate_right"):
        dataset("a long text is cut", prompt).limit_length(12, "truncate_right")
    prompts = dataset("ab", prompt)
    prompts.limit_length(12, "truncate_left")
    assert prompts.texts[1].rstrip().endswith("istant:")


# Conversations with their answer


def test_the_answer_of_a_conversation_is_cut_and_counted(tmp_path, capsys):
    rows = [
        {"messages": [user("2+2?"), assistant("4")]},
        {"messages": [user("a"), assistant("b"), user("c")]},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), assistant("e")]},
    ]
    given = several(tmp_path, rows)
    batch = only_batch(given)
    asked = "user: a<eos>\nassistant: b<eos>\nuser: c<eos>\nassistant: "
    assert batch.texts == texts_of(batch.tokens) == ["user: 2+2?<eos>\nassistant: ", asked, asked]
    assert batch.prompts == [rows[0]["messages"][:1], rows[1]["messages"], rows[2]["messages"][:3]]
    assert batch.columns["messages"] == [row["messages"] for row in rows]  # score functions see what the file has
    said, too_few = capsys.readouterr().out.splitlines()
    assert said.startswith("2 of 3 prompts of") and "source0.jsonl end with the assistant's turn" in said
    assert too_few.startswith("3 prompts are fewer than the 100 of an iteration")
    create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("prompts", "told"), [("abc", True), ("abcd", False), ("abcde", False)])
def test_fewer_prompts_than_an_iteration_takes_are_told(tmp_path, capsys, prompts, told):
    create_prompt_dataloader(args(tmp_path, list(prompts)), byte_tokenizer(), rank=0, world_size=2)
    assert ("fewer than the 4" in capsys.readouterr().out) == told


def test_a_conversation_of_answers_alone_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"line 2, column 'prompt': the conversation has an answer and no prompt"):
        dataset("a", [assistant("b")])


def test_the_input_of_an_instruction_belongs_to_it(tmp_path):
    rows = [{"instruction": "add", "input": "2 2", "output": "4"}, {"instruction": "go", "input": "", "output": "on"}]
    batch = only_batch(several(tmp_path, rows))
    assert batch.prompts == batch.texts == ["add\n\n2 2", "go"]
    assert batch.columns["instruction"] == ["add", "go"]  # score functions see what the file has
    assert only_batch(several(tmp_path, rows, prompt_column="instruction")).texts == ["add", "go"]


# Batches


def test_a_batch_carries_its_columns_and_row_numbers():
    batch = dataset("a", "b", "c").batch([2, 0])
    assert (batch.ids, batch.texts) == ([2, 0], ["c", "a"])
    assert batch.columns == {"prompt": ["c", "a"], "number": [2, 0]}
    assert texts_of(batch.tokens) == ["c", "a"]


def test_every_column_of_any_row_is_there():
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "7"}]
    source = Source("mine.jsonl", rows, ["mine.jsonl, line 1", "mine.jsonl, line 2"])
    assert PromptDataset([source], byte_tokenizer()).batch([0, 1]).columns["answer"] == [None, "7"]


def test_a_prompt_that_ends_with_eos_has_not_ended_as_text_or_as_tokens():
    batch = dataset("stop at <eos>", "<eos>").batch([0, 1])
    assert batch.texts == ["stop at ", "<eos>"] == texts_of(batch.tokens)


def test_repeated_keeps_samples_of_a_prompt_together():
    batch = dataset("a", "b").batch([1, 0]).repeated(3)
    assert batch.ids == [1, 1, 1, 0, 0, 0]
    assert batch.columns["number"] == [1, 1, 1, 0, 0, 0]
    assert texts_of(batch.tokens) == batch.texts == ["b", "b", "b", "a", "a", "a"]
    assert len(batch) == 6


def epoch(num_rows, batch_size, world_size, *, seed=0, epochs=1):
    """Per epoch the batches, per batch each rank's rows."""
    samplers = [
        GlobalBatches(num_rows, batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    return [list(zip(*(list(sampler) for sampler in samplers), strict=True)) for _ in range(epochs)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(1, 5))
def test_the_ranks_together_draw_what_one_rank_draws_alone(num_rows, batch_size, seed, world_size):
    alone = [list(rows) for (rows,) in epoch(num_rows, batch_size, 1, seed=seed)[0]]
    shared = epoch(num_rows, batch_size, world_size, seed=seed)[0]
    assert [joined(parts) for parts in shared] == alone
    for parts in shared:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    flat = joined(alone)
    assert sorted(flat) == list(range(num_rows))
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1)
    sampler = GlobalBatches(num_rows, batch_size, seed=seed, rank=0, world_size=world_size)
    assert len(sampler) == len(alone)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second, third = ([rows for (rows,) in one] for one in epoch(50, 10, 1, epochs=3))
    other_seed = [rows for (rows,) in epoch(50, 10, 1, seed=1)[0]]
    assert len({str(order) for order in (first, second, third, other_seed)}) == 4
    assert [rows for (rows,) in epoch(50, 10, 1, epochs=2)[1]] == second


def test_fewer_prompts_than_ranks_leave_the_last_ranks_empty():
    ((parts,),) = epoch(2, 8, 3)
    assert [len(part) for part in parts] == [1, 1, 0]
    assert sorted(joined(parts)) == [0, 1]


def test_an_empty_share_is_an_empty_batch(tmp_path):
    loader, total = create_prompt_dataloader(args(tmp_path, ["a", "b"]), byte_tokenizer(), rank=2, world_size=3)
    (batch,) = list(loader)
    assert total == 1
    assert len(batch) == 0 and batch.tokens == [] and batch.columns == {"prompt": [], "n": []}
    assert len(batch.repeated(4)) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_dataloaders_of_all_ranks_make_up_the_dataset(tmp_path, world_size):
    texts = [f"prompt {number}" for number in range(7)]
    given = args(tmp_path, texts)
    loaders = [
        create_prompt_dataloader(given, byte_tokenizer(), rank=rank, world_size=world_size)[0]
        for rank in range(world_size)
    ]
    batches = list(zip(*loaders, strict=True))
    assert [sum(len(part) for part in parts) for parts in batches] == [4, 3]
    seen = [(row, text) for parts in batches for part in parts for row, text in zip(part.ids, part.texts, strict=True)]
    assert sorted(seen) == list(enumerate(texts))
    alone = create_prompt_dataloader(given, byte_tokenizer(), rank=0, world_size=1)[0]
    assert [row for row, _ in seen] == [row for batch in alone for row in batch.ids]


def test_dropped_prompts_never_come_up_and_are_counted_once(tmp_path, capsys):
    given = args(tmp_path, ["abcd", "ab", "abcdef", "abc", "a"], per_iteration=2, max_prompt_tokens=3)
    loader, total = create_prompt_dataloader(given, byte_tokenizer(), rank=0, world_size=1)
    assert "2 of 5 prompts" in capsys.readouterr().out
    assert sorted(text for batch in loader for text in batch.texts) == ["a", "ab", "abc"]
    assert sorted(row for batch in loader for row in batch.ids) == [1, 3, 4]
    assert total == 2
    create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)
    assert capsys.readouterr().out == ""


def test_the_number_of_iterations(tmp_path):
    texts = ["x"] * 9
    assert create_prompt_dataloader(args(tmp_path, texts, epochs=3), byte_tokenizer(), rank=0, world_size=1)[1] == 9
    given = args(tmp_path, texts, epochs=3, iterations=5)
    assert create_prompt_dataloader(given, byte_tokenizer(), rank=0, world_size=1)[1] == 5


# Several sources


def several(tmp_path, *sources, per_iteration=100, seed=0, **data):
    """Each source a list of rows, in files of their own."""
    files = [tmp_path / f"source{number}.jsonl" for number in range(len(sources))]
    for file, rows in zip(files, sources, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        data=DataConfig(train=[str(file) for file in files], **data),
        rollout=SimpleNamespace(environment=None),
        prompts_per_iteration=per_iteration,
        num_iterations=None,
        num_train_epochs=1,
        seed=seed,
    )


def only_batch(given) -> PromptBatch:
    """All prompts in use, in the order of the files."""
    dataset = create_prompt_dataloader(given, byte_tokenizer(), rank=0, world_size=1)[0].dataset
    return dataset.batch([dataset[index] for index in range(len(dataset))])


def test_each_source_has_its_own_prompt_column(tmp_path):
    given = several(
        tmp_path,
        [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}],
        [{"question": "c", "level": "hard"}],
        [{"messages": [{"role": "user", "content": "d"}], "prompts": "not this"}],
    )
    batch = only_batch(given)
    assert batch.texts == texts_of(batch.tokens) == ["a", "b", "c", "user: d<eos>\nassistant: "]
    assert batch.ids == [0, 1, 2, 3]
    assert batch.columns["answer"] == [1, 2, None, None]
    assert batch.columns["question"] == [None, None, "c", None]
    assert batch.columns["level"] == [None, None, "hard", None]


def test_a_bad_prompt_is_named_with_its_own_source_and_column(tmp_path):
    given = several(tmp_path, [{"prompt": "a"}], [{"question": "b"}, {"question": 7}])
    with pytest.raises(ValueError, match=r"source1\.jsonl, line 2, column 'question'"):
        only_batch(given)
    given = several(tmp_path, [{"prompt": "a"}], [{"story": "b"}])
    with pytest.raises(ValueError, match=r"source1\.jsonl has no column prompt / .* its columns are story"):
        only_batch(given)
    with pytest.raises(ValueError, match=r"source1\.jsonl has no column prompt; its columns are story"):
        only_batch(several(tmp_path, [{"prompt": "a"}], [{"story": "b"}], prompt_column="prompt"))


def test_weights_choose_among_the_prompts(tmp_path, capsys):
    given = several(
        tmp_path, [{"prompt": f"a{n}"} for n in range(9)], [{"prompt": f"b{n}"} for n in range(3)], weights=[2, 3]
    )
    batch = only_batch(given)
    assert [text[0] for text in batch.texts] == ["a"] * 2 + ["b"] * 3
    assert batch.ids == sorted(set(batch.ids)) and batch.ids[2:] == [9, 10, 11]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 of 9 rows of") and said[1].startswith("3 of 3 rows of")
    loader, total = create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)
    assert total == 1 and capsys.readouterr().out == ""
    assert set(joined(part.ids for part in loader)) <= set(batch.ids)


def test_weights_are_shares_of_the_prompts_in_use(tmp_path):
    given = several(
        tmp_path,
        [{"prompt": "aa" + "x" * 9 * (n < 2)} for n in range(4)],
        [{"prompt": "bb"} for _ in range(4)],
        weights=[1, 1],
        max_prompt_tokens=5,
    )
    assert only_batch(given).texts == ["aa"] * 2 + ["bb"] * 2


def test_without_weights_samples_are_counted_per_source(tmp_path):
    given = several(tmp_path, [{"prompt": "a"}] * 3, [{"prompt": "b"}] * 3, max_samples=2)
    assert only_batch(given).texts == ["a", "a", "b", "b"]


# The chat format, and what ranks compare


def test_a_string_is_what_the_user_says_under_chat(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "system", "content": "b"}]}]
    text, conversation = "user: a<eos>\nassistant: ", "system: b<eos>\nassistant: "
    batch = only_batch(several(tmp_path, rows, prompt_format="chat"))
    assert batch.texts == texts_of(batch.tokens) == [text, conversation]
    assert batch.prompts == [[{"role": "user", "content": "a"}], rows[1]["prompt"]]
    assert batch.columns["prompt"] == ["a", rows[1]["prompt"]]  # score functions see what the file has
    batch = only_batch(several(tmp_path, rows, prompt_format="text"))
    assert batch.texts == texts_of(batch.tokens) == ["a", conversation]


def test_the_digest_is_of_the_prompts_in_use():
    def after(*texts, limit=9, over_length="drop", rows=range(9)):
        prompts = dataset(*texts)
        prompts.limit_length(limit, over_length)
        prompts.kept = [row for row in prompts.kept if row in rows]
        return prompts.digest

    assert after("ab", "cd") == after("ab", "cd") == after("ab", "long", "cd", limit=2)
    assert after("ab", "cd", "ef", rows=[0, 1]) == after("ab", "cd")
    assert after("abc", "cd", limit=2, over_length="truncate_right") == after("ab", "cd")
    others = [("ab", "ce"), ("cd", "ab"), ("abcd",), ("a", "bcd"), ("ab",), ("ab", "cd", "cd")]
    assert len({after(*texts) for texts in [("ab", "cd"), *others]}) == 1 + len(others)


def test_the_columns_have_a_digest_of_their_own():
    ours, theirs = dataset("ab", "cd"), dataset("ab", "cd")
    assert ours.columns_digest == theirs.columns_digest
    theirs.rows[1]["answer"] = "other"
    assert ours.digest == theirs.digest and ours.columns_digest != theirs.columns_digest


# create_datasets


def test_create_datasets_takes_its_share_from_the_launchers_variables(tmp_path, monkeypatch):
    given = args(tmp_path, [f"p{number}" for number in range(6)], per_iteration=6)

    def rows(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        loader, total = create_datasets(given, byte_tokenizer(), 3)
        (batch,) = list(loader)
        assert isinstance(batch, PromptBatch) and total == 1
        return batch.ids

    alone = rows(0, 1)
    assert rows(0, 2) == alone[:3] and rows(1, 2) == alone[3:]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    (batch,) = list(create_datasets(given, byte_tokenizer(), 3)[0])
    assert batch.ids == alone


@pytest.mark.parametrize("phase", [0, 4, "3", None])
def test_create_datasets_refuses_another_phase(tmp_path, phase):
    with pytest.raises(ValueError, match="train_phase="):
        create_datasets(args(tmp_path, ["a"]), byte_tokenizer(), phase)


# Environments


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a"], r"prompts\.jsonl, line 1, column 'prompt': the prompt is text, .*--data\.prompt_format chat"),
        ([[user("a")], "b"], r"prompts\.jsonl, line 2, column 'prompt': the prompt is text"),
    ],
)
def test_an_environment_needs_conversations(tmp_path, prompts, said):
    given = args(tmp_path, prompts)
    create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)
    given.rollout.environment = "some:Class"
    with pytest.raises(ValueError, match=said):
        create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)


def test_an_environment_needs_a_template_that_goes_on(tmp_path):
    given = args(tmp_path, ["a"], prompt_format="chat")
    given.rollout.environment = "some:Class"
    create_prompt_dataloader(given, byte_tokenizer(), rank=1, world_size=2)
    one_answer = word_tokenizer(template="{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1, .*a conversation cannot go on"):
        create_prompt_dataloader(given, one_answer, rank=1, world_size=2)
