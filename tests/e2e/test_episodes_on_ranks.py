"""Runs with an environment, on two ranks: conversations of different lengths, what must not change numbers, errors."""

import json

import pytest
import tiny
import torch
from runs import Log, build, digest
from test_laws import furthest
from torch.nn import functional as F

from engine.distributed import comm
from engine.models.random_init import byte_tokenizer
from engine.rollout.measuring import reward_model_scores

AT = "test_episodes_on_ranks:"
# A random model ends a response once in 258 tokens. Here half of the tokens do, so that there are turns to speak of.
MANY_EOS = list(range(20, 150))
LONGEST = 110


class RowTimes:
    """Replies as often as the row's number says: 0 to 3 times."""

    def __init__(self, number):
        self.left = number % 4

    def reply(self, conversation):
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        self.left -= 1
        return "ok" * (self.left + 1) if self.left >= 0 else None


class Silent:
    def reply(self, conversation):
        return None


class Forever:
    def reply(self, conversation):
        return "on"


class RaisesInTheSecondTurnOfRowFive:
    def __init__(self, number):
        self.number = number

    def reply(self, conversation):
        if self.number == 5 and len(conversation) == 4:
            raise RuntimeError("the board is gone")
        return "go on"


class RepliesWithANumberOnRankOne:
    def reply(self, conversation):
        return 42 if comm.rank() == 1 else None


class CannotBeMadeOnRankOne:
    def __init__(self):
        if comm.rank() == 1:
            raise OSError("no such game")

    def reply(self, conversation):
        return None


def letters(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def turns_and_letters(prompts, responses, conversations, number, **columns):
    """Reads whole dialogues: the actor's turns, and a little of what it said."""
    for response, conversation, row in zip(responses, conversations, number, strict=True):
        assert conversation[0] == {"role": "user", "content": tiny.PROMPTS[row]}
        assert conversation[-1]["role"] == "assistant"
        assert response == "\n".join(turn["content"] for turn in conversation if turn["role"] == "assistant")
    return [
        sum(turn["role"] == "assistant" for turn in conversation) + 0.01 * len(response)
        for response, conversation in zip(responses, conversations, strict=True)
    ]


def fails_for_row_three(prompts, responses, conversations, number, **columns):
    if 3 in number:
        raise RuntimeError("no gold answer")
    return [float(len(conversation)) for conversation in conversations]


@pytest.fixture
def config(ppo_config):
    """`config(**overrides)`: chats with RowTimes, scored by whole dialogues."""
    return lambda **given: ppo_config(**chat() | given)


def chat() -> dict:
    return dict(
        data__prompt_format="chat",
        data__max_prompt_tokens=64,
        rollout__max_response_tokens=LONGEST,
        rollout__environment=AT + "RowTimes",
        reward__function=AT + "turns_and_letters",
        num_iterations=2,
    )


def with_many_ends(config):
    trainer, prompts = build(config)
    trainer.eos_token_ids.extend(MANY_EOS)  # the sampler's list and the scoring's
    return trainer, prompts


def trained(config):
    trainer, prompts = with_many_ends(config)
    log = Log()
    trainer.train(prompts, config.num_iterations, log)
    return dict(
        metrics=log.metrics,
        samples=log.samples,
        digests=[digest(trainer.actor), digest(trainer.critic)],
    )


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(trained, tiny.ppo_config(tmp_path_factory.mktemp("plain"), zero_stage=0, **chat()))


# What may not change the numbers


def test_episodes_of_different_lengths_are_trained_on(plain):
    first, second = plain
    assert first["metrics"] == second["metrics"] and first["digests"] == second["digests"]
    for line in first["metrics"]:
        assert 1.3 < line["response/turns_mean"] <= 2.5
        assert line["skipped/steps"] == 0 and line["policy/first_log_ratio_max"] < 1e-4
    assert abs(first["metrics"][0]["kl/ref_mean"]) < 1e-4 < abs(first["metrics"][1]["kl/ref_mean"])


@pytest.mark.parametrize(
    ("kind", "world_size", "more"),
    [
        (2, 2, {}),
        ("strict", 2, {}),
        ("strict", 2, dict(rollout__weights="sharded", rollout__micro_batch_size=2)),
        (0, 1, dict(micro_batch_size=4)),
        ("strict", 1, {}),
    ],
)
def test_ranks_and_sharding_leave_the_numbers_alone(run_ranks, config, tmp_path, plain, kind, world_size, more):
    run = run_ranks(trained, config(**tiny.sharding(kind, tmp_path), **more), world_size=world_size)[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5


@pytest.mark.parametrize("sharded", [False, True])
def test_a_rank_without_prompts_keeps_step(run_ranks, config, strict_z3, sharded):
    given = dict(prompts=tiny.PROMPTS[3:4], rollout__environment=AT + "Forever", rollout__max_turns=3)
    given |= dict(reward__function=AT + "letters")
    one = run_ranks(trained, config(**given), world_size=1)[0]["metrics"]
    more = dict(rollout__weights="sharded" if sharded else "gathered", ds_config=strict_z3)
    first, second = run_ranks(trained, config(**given, **more))
    assert first["metrics"] == second["metrics"] and furthest(first["metrics"], one) < 1e-4
    assert one[0]["response/turns_mean"] > 1


@pytest.mark.parametrize("kind", [0, "strict"])
def test_an_environment_that_says_nothing_is_none(run_ranks, config, tmp_path, kind):
    given = dict(reward__function=AT + "letters", **tiny.sharding(kind, tmp_path))
    silent, without = (
        run_ranks(trained, config(**given, rollout__environment=environment))[0]
        for environment in (AT + "Silent", None)
    )
    assert [line.pop("response/turns_mean") for line in silent["metrics"]] == [1, 1]
    assert silent["metrics"] == without["metrics"] and silent["digests"] == without["digests"]


# What the numbers are


def measured(config):
    """An experience with what plain forward passes say of its rows; nothing in it is read by the engine's positions."""
    trainer, prompts = with_many_ends(config)
    batch = next(iter(prompts))
    kept = []
    play = trainer.episodes

    def keep(prompts):
        kept.append(play(prompts))
        return kept[-1]

    trainer.episodes = keep
    experience = trainer.generate_experience(batch)
    mine = kept[0].sequences
    own = []  # True for the actor's tokens, from gaps and lengths, by a loop
    gaps = iter(experience.sequences.gaps.tolist())
    for prompt, length in zip(
        experience.sequences.prompt_lengths.tolist(), experience.sequences.response_lengths.tolist(), strict=True
    ):
        row = [False] * prompt
        for _ in range(length):
            row += [False] * next(gaps) + [True]
        own.append(row)
    rows = experience.sequences.tokens.split(list(map(len, own)))
    actor, critic = trainer.actor.module, trainer.critic.module
    logprobs, values = [], []
    with torch.no_grad():
        for row, mask in zip(rows, own, strict=True):
            at = [t for t, is_own in enumerate(mask) if is_own]
            said = F.log_softmax(actor.model(input_ids=row[None]).logits[0] / config.rollout.temperature, dim=-1)
            logprobs += [said[t - 1, row[t]].item() for t in at]
            hidden = critic.model.base_model(input_ids=row[None]).last_hidden_state[0]
            scores = critic.model.score(hidden).squeeze(-1)
            values += [scores[t - 1].item() for t in at]
    prompt_lengths = experience.sequences.prompt_lengths.tolist()
    between = [
        trainer.tokenizer.decode([token for token, is_own in pairs if not is_own])
        for pairs in (
            list(zip(row.tolist(), mask, strict=True))[prompt:]
            for row, mask, prompt in zip(rows, own, prompt_lengths, strict=True)
        )
    ]
    everyones = [row for rank in comm.gathered_objects(kept[0].conversations) for row in rank]
    return dict(
        experience=experience,
        logprobs=torch.tensor(logprobs),
        values=torch.tensor(values),
        between=between,
        conversations=everyones,
        rows=len(mine),
    )


def test_log_probabilities_and_values_are_those_of_plain_forward_passes(run_ranks, config):
    given = config(zero_stage=2, rollout__temperature=0.7)
    found, other = run_ranks(measured, given)
    experience = found["experience"]
    assert (experience.sequences.gaps > 0).any() and found["rows"] == other["rows"] == 4
    torch.testing.assert_close(experience.logprobs, found["logprobs"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(experience.behaviour_logprobs, experience.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(experience.ref_logprobs, experience.logprobs, atol=1e-5, rtol=1e-5)
    # The critic's head is its own: the module adds no statistics of scores where there is no reward model.
    torch.testing.assert_close(experience.values, found["values"], atol=1e-5, rtol=1e-5)
    for between, conversation in zip(found["between"], found["conversations"], strict=True):
        replies = [message["content"] for message in conversation[1:] if message["role"] == "user"]
        assert between == "".join(f"\nuser: {reply}<eos>\nassistant: " for reply in replies)
        assert len(conversation) == 2 + 2 * len(replies)


def test_a_policy_that_learns_nothing_has_ratio_one(run_ranks, config):
    still = dict(actor__learning_rate=0.0, critic__learning_rate=0.0, rollout__temperature=0.7)
    for line in run_ranks(trained, config(zero_stage=2, **still))[0]["metrics"]:
        assert line["policy/first_log_ratio_max"] < 1e-4 and line["policy/ratio_max"] < 1 + 1e-4
        assert abs(line["kl/ref_mean"]) < 1e-4


def gradient_of_the_actor(config):
    """The change of the actor's weights by one step of plain gradient descent, here and by a loop over whole rows."""
    trainer, prompts = with_many_ends(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    sequences, model = experience.sequences, trainer.actor.module.model
    gaps, advantages = iter(sequences.gaps.tolist()), iter(experience.advantages.tolist())
    start, loss = 0, 0.0
    for prompt, length, whole in zip(
        sequences.prompt_lengths.tolist(),
        sequences.response_lengths.tolist(),
        sequences.lengths.tolist(),
        strict=True,
    ):
        row = sequences.tokens[start : start + whole]
        said = model(input_ids=row[None]).logits[0].log_softmax(-1)
        at = prompt - 1
        for _ in range(length):
            at += next(gaps) + 1
            logprob = said[at - 1, row[at]]
            loss = loss - next(advantages) * (logprob - logprob.detach()).exp()
        assert at == whole - 1
        start += whole
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss / sequences.num_response_tokens, parameters)
    wanted_norm = torch.stack([gradient.square().sum() for gradient in wanted]).sum().sqrt().item()
    trainer.train_rlhf(experience)
    return wanted_norm, trainer.steps[-1]["grad_norm/actor"]


def test_the_gradient_is_that_of_the_actors_tokens_alone(run_ranks, config):
    """kl_coef 0 and one step: the clipped loss is -A times the ratio there."""
    for wanted, found in run_ranks(gradient_of_the_actor, config(zero_stage=0, kl_coef=0.0)):
        assert found == pytest.approx(wanted, rel=1e-4)


# Limits


def episodes_of(config):
    trainer, prompts = with_many_ends(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    sequences = experience.sequences
    rows = torch.arange(len(sequences)).repeat_interleave(sequences.response_lengths)
    turns = 1 + torch.zeros_like(sequences.response_lengths).index_add(0, rows, (sequences.gaps > 0).long())
    return turns.tolist(), (sequences.lengths - sequences.prompt_lengths).tolist()


def test_an_environment_that_never_ends_is_ended(run_ranks, config):
    forever = dict(rollout__environment=AT + "Forever")
    turns, lengths = run_ranks(episodes_of, config(**forever, rollout__max_turns=2))[0]
    assert set(turns) <= {1, 2} and turns.count(2) > 4
    turns, lengths = run_ranks(episodes_of, config(**forever))[0]
    assert max(turns) > 2 and max(lengths) <= LONGEST
    reply = len("\nuser: on") + 1 + len("\nassistant: ")
    assert all(LONGEST - reply <= length for length in lengths), "each went on while a reply and an answer fitted"


# What goes wrong on one rank


def said(config):
    try:
        trainer, prompts = with_many_ends(config)
        trainer.generate_experience(next(iter(prompts)))
    except ValueError as error:
        comm.barrier()  # every rank got here
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", [2, "strict", "sharded"])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            "RaisesInTheSecondTurnOfRowFive",
            r"on rank \d of 2: the environment Raises.* raised RuntimeError: the board is gone \(",
        ),
        ("RepliesWithANumberOnRankOne", r"on rank 1 of 2: the environment .* replied '42', a int: "),
        ("CannotBeMadeOnRankOne", r"on rank 1 of 2: the environment .* raised OSError: no such game \("),
    ],
)
def test_an_environment_that_fails_on_one_rank_is_one_error_on_all(
    run_ranks, config, tmp_path, kind, environment, message
):
    given = dict(
        rollout__environment=AT + environment, **tiny.sharding("strict" if kind == "sharded" else kind, tmp_path)
    )
    if kind == "sharded":
        given["rollout__weights"] = "sharded"
    first, second = run_ranks(said, config(**given))
    assert first == second
    with pytest.raises(ValueError, match=message):
        raise ValueError(first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(rollout__environment=AT + "Nobody"), "test_episodes_on_ranks has no class Nobody"),
        (
            dict(data__prompt_format="text"),
            "line 1, column 'prompt': the prompt is text, and with rollout.environment .*prompt_format chat",
        ),
    ],
)
def test_what_cannot_begin_is_refused_on_all_ranks(run_ranks, config, given, message):
    first, second = run_ranks(said, config(**given))
    assert first == second
    with pytest.raises(ValueError, match=message):
        raise ValueError(first)


# Scores and samples


def test_a_dialogue_that_cannot_be_scored_is_left_out_of_training(run_ranks, config):
    given = dict(reward__function=AT + "fails_for_row_three", reward__on_error="mask")
    two, one = (run_ranks(trained, config(**given), world_size=size)[0]["metrics"] for size in (2, 1))
    assert {line["score/failed"] for line in two} == {1} and furthest(two, one) < 1e-4


def penalised(config):
    trainer, prompts = with_many_ends(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    sequences = experience.sequences
    taken = experience.scores - experience.padded("rewards").sum(1)
    return taken.tolist(), (sequences.lengths - sequences.prompt_lengths).tolist()


def test_the_penalty_on_length_counts_the_tokens_of_the_limit(run_ranks, config):
    """The user's too: an episode is cut off by all that follows the prompt."""
    given = dict(reward__overlong_penalty=2.0, reward__overlong_tokens=LONGEST, kl_coef=0.0)
    taken, lengths = run_ranks(penalised, config(**given))[0]
    assert taken == pytest.approx([2 * length / LONGEST for length in lengths], abs=1e-5)


def test_samples_show_whole_dialogues(plain):
    samples = plain[0]["samples"]
    assert len(samples) == 4 and plain[1]["samples"] == []
    assert any(len(row["conversation"]) > 2 for row in samples)
    for row in json.loads(json.dumps(samples)):
        assert row["prompt"] == f"user: {row['conversation'][0]['content']}<eos>\nassistant: "
        assert row["response"] == "\n".join(turn["content"] for turn in row["conversation"][1::2])


def scores_by_text(config):
    """The scores of one iteration, and what the reward model says to the dialogues as its own template writes them."""
    trainer, prompts = with_many_ends(config)
    trainer.scoring.reward_tokenizer = byte_tokenizer()
    trainer.scoring.reward_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    kept, play = [], trainer.episodes

    def keep(prompts):
        kept.append(play(prompts))
        return kept[-1]

    trainer.episodes = keep
    experience = trainer.generate_experience(next(iter(prompts)))
    wanted = []
    for conversation, response in zip(kept[0].conversations, kept[0].drawn.tokens, strict=True):
        text = "".join(f"[{turn['role']}]{turn['content']}<eos>" for turn in conversation)
        if response[-1] not in trainer.eos_token_ids:
            text = text.removesuffix("<eos>")
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            wanted.append(trainer.reward(ids, torch.tensor([ids.shape[1] - 1])).item())
    return experience.scores.tolist(), [score for rank in comm.gathered_objects(wanted) for score in rank]


def test_a_reward_model_with_its_own_template_reads_the_whole_dialogue(run_ranks, config, ppo_config):
    given = chat() | dict(zero_stage=2)
    del given["reward__function"]
    for scores, wanted in run_ranks(scores_by_text, ppo_config(**given)):
        assert scores == pytest.approx(wanted, abs=1e-5) and len(set(scores)) > 4


def scores_by_tokens(config):
    trainer, prompts = with_many_ends(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    rows = experience.sequences.tokens.split(experience.sequences.lengths.tolist())
    with torch.no_grad():
        wanted = [trainer.reward(row[None], torch.tensor([len(row) - 1])).item() for row in rows]
    again = reward_model_scores(experience.sequences, trainer.reward, token_budget=300).tolist()
    return experience.scores.tolist(), wanted, again


def test_a_reward_model_reads_the_last_token_of_the_dialogue(run_ranks, ppo_config):
    given = chat() | dict(zero_stage=2)
    del given["reward__function"]
    scores, wanted, again = run_ranks(scores_by_tokens, ppo_config(**given))[0]
    assert scores == pytest.approx(wanted, abs=1e-5) and again == pytest.approx(wanted, abs=1e-5)
