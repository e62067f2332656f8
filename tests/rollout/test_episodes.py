"""episodes.py with a sampler whose turns are written by hand; and PPO on episodes against a slow oracle with holes.

The oracle goes over whole rows, token by token, and skips those that the actor did not write.
"""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import PromptBatch
from engine.data.sequences import Sequences
from engine.models.language_model import TokenLogprobs, load_language_model
from engine.models.random_init import byte_tokenizer
from engine.rollout import episodes as module
from engine.rollout.episodes import played_episodes
from engine.rollout.experience import shaped_experience
from engine.rollout.generation import Responses
from engine.rollout.measuring import Measurements
from engine.trainers.policy_objective import PolicyObjective
from engine.trainers.ppo_metrics import ended, experience_metrics

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
BETWEEN = len("\nuser: ") + 1 + len("\nassistant: ")  # the template's tokens round a reply


# What ends an episode


@pytest.fixture
def play(monkeypatch):
    """`play(environment, *turns_of_rows, limit, max_turns=None)`: (episodes, calls of the sampler) on one rank.

    A turn is text; it ends by itself, unless it is cut off where the sampler is told to.
    """
    monkeypatch.setattr(module.comm, "any_true", bool)
    monkeypatch.setattr(module.comm, "gathered_objects", lambda value: [value])
    monkeypatch.setattr(module.comm, "world_size", lambda: 1)

    def run(environment, *rows, limit=200, max_turns=None):
        left, calls = [list(turns) for turns in rows], []
        prompts = [[{"role": "user", "content": f"p{row}"}] for row in range(len(rows))]
        tokens = [[row + 2] for row in range(len(rows))]

        def draw(asked, keys, limits):
            calls.append(dict(asked=asked, keys=keys, limits=limits))
            said = []
            for ids, room in zip(asked, limits, strict=True):
                text = left[ids[0] - 2].pop(0)
                said.append([*TOKENIZER(text)["input_ids"], EOS][:room])
            numbers = [[-float(len(turn))] * len(turn) for turn in said]
            return Responses(said, numbers, numbers, *([[half] * len(turn) for turn in said] for half in (0.5, 0.25)))

        @contextmanager
        def drawing():
            yield draw

        sampler = SimpleNamespace(
            drawing=drawing, eos_token_ids=[EOS], sampling=SimpleNamespace(max_response_tokens=limit)
        )
        batch = PromptBatch(
            prompts=prompts,
            tokens=tokens,
            texts=["" for _ in rows],
            ids=list(range(len(rows))),
            columns={"number": list(range(len(rows)))},
        )
        keys = [(7, row) for row in range(len(rows))]
        given = dict(sampler=sampler, tokenizer=TOKENIZER, max_turns=max_turns)
        return played_episodes(batch, keys, environment, **given), calls

    return run


class Forever:
    def reply(self, conversation):
        assert conversation[-1]["role"] == "assistant"
        return f"more{len(conversation)}"


class RowTimes:
    """Replies as often as the row's number says."""

    def __init__(self, number):
        self.left = number

    def reply(self, conversation):
        self.left -= 1
        return "ok" if self.left >= 0 else None


def texts(episodes, row):
    return [message["content"] for message in episodes.conversations[row]]


def whole(episodes, row):
    lengths = episodes.sequences.lengths.tolist()
    return TOKENIZER.decode(episodes.sequences.tokens.split(lengths)[row][1:].tolist())


def test_the_environment_ends_each_episode_in_its_own_turn(play):
    found, calls = play(RowTimes, ["a", "-"], ["b", "cd", "-"], ["e", "f", "g", "-"])
    assert texts(found, 0) == ["p0", "a"]
    assert texts(found, 1) == ["p1", "b", "ok", "cd"]
    assert texts(found, 2) == ["p2", "e", "ok", "f", "ok", "g"]
    assert whole(found, 1) == "b<eos>\nuser: ok<eos>\nassistant: cd<eos>"
    assert [TOKENIZER.decode(ids) for ids in found.drawn.tokens] == ["a<eos>", "b<eos>cd<eos>", "e<eos>f<eos>g<eos>"]
    assert found.drawn.logprobs[1] == found.drawn.behaviour_logprobs[1] == [-2.0] * 2 + [-3.0] * 3
    assert found.drawn.entropy[2] == [0.5] * 6 and found.drawn.values[2] == [0.25] * 6
    assert found.sequences.gaps.tolist() == [0, 0, 0, 0, BETWEEN + 2, 0, 0, 0, 0, *[BETWEEN + 2, 0] * 2]
    assert [len(call["asked"]) for call in calls] == [3, 2, 1]
    assert (
        TOKENIZER.decode(calls[2]["asked"][0][1:])
        == "e<eos>\nuser: ok<eos>\nassistant: f<eos>\nuser: ok<eos>\nassistant: "
    )


def test_noise_is_keyed_by_the_turn_and_the_first_is_that_of_a_plain_response(play):
    _, calls = play(RowTimes, ["-"], ["b", "-"], ["e", "f", "-"])
    assert [call["keys"] for call in calls] == [[(7, 0), (7, 1), (7, 2)], [(7, 1, 1), (7, 2, 1)], [(7, 2, 2)]]


def test_an_environment_that_never_ends_is_ended_by_max_turns(play):
    found, calls = play(Forever, ["a", "b", "c", "d"], max_turns=3)
    assert texts(found, 0) == ["p0", "a", "more2", "b", "more4", "c"] and len(calls) == 3
    assert texts(play(Forever, ["a", "b"], max_turns=1)[0], 0) == ["p0", "a"]


@pytest.mark.parametrize(("room", "turns"), [(0, 1), (1, 2), (2, 2)])
def test_an_environment_that_never_ends_is_ended_by_the_token_limit(play, room, turns):
    """After "a<eos>" and the reply there is place for `room` more tokens; with none the reply is dropped."""
    limit = 2 + BETWEEN + len("more2") + room
    found, calls = play(Forever, ["a", "b", "c"], limit=limit)
    assert texts(found, 0) == ["p0", "a", "more2", "b"[:room]][: 2 * turns]
    assert [call["limits"] for call in calls] == [[limit], [room]][:turns]
    assert int(found.sequences.lengths[0]) - 1 == (2 if turns == 1 else limit)


def test_a_turn_that_was_cut_off_ends_the_episode(play):
    found, _ = play(Forever, ["abcdefg", "-"], ["abcdefgh", "-"], limit=8)
    assert texts(found, 0) == ["p0", "abcdefg"] and texts(found, 1) == ["p1", "abcdefgh"]
    assert ended(found.sequences, [EOS]).tolist() == [True, False]


def test_nobody_is_asked_when_there_is_no_place_for_an_answer(play):
    class Never:
        def reply(self, conversation):
            raise AssertionError("asked")

    assert whole(play(Never, ["abc"], limit=4)[0], 0) == "abc<eos>"


def test_the_prompts_messages_stay_as_they_are(play):
    found, _ = play(Forever, ["a", "b"], max_turns=2)
    assert found.conversations[0][0] == {"role": "user", "content": "p0"}


def test_no_prompts(play):
    found, calls = play(Forever)
    assert (*found.drawn, found.conversations, calls) == ([], [], [], [], [], [], []) and len(found.sequences) == 0


def test_a_reply_that_is_not_unicode_is_the_environments_fault(play):
    class Half:
        def reply(self, conversation):
            return "\ud800"

    with pytest.raises(ValueError, match=r"the reply of the environment .*Half: the text is not Unicode"):
        play(Half, ["a", "b"])


# PPO on rows with holes

GIVEN = dict(
    kl_placement="reward", advantage_estimator="gae", group_size=1, value_label="gae", kl_coef=0.3, gamma=0.9, lam=0.8
)
# Of each row which tokens after the prompt are the actor's; the last is.
HOLES = st.lists(st.lists(st.booleans(), max_size=9).map(lambda row: [True, *row, True]), min_size=1, max_size=5)


def parts_of(row: list[bool], number: int) -> list[list[int]]:
    """Token lists, the actor's and others' in turn."""
    parts, last = [[]], True
    for column, own in enumerate(row):
        if own != last:
            parts.append([])
        parts[-1].append(100 * number + column + 2)
        last = own
    return parts


def episode_sequences(holes) -> Sequences:
    prompts = [[1] * (1 + number % 3) for number in range(len(holes))]
    return Sequences.of_turns(prompts, [parts_of(row, number) for number, row in enumerate(holes)])


def measured(holes, seed=0):
    """(Measurements, the same by row and column with NaN in the holes), and scores."""
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "behaviour_logprobs", "ref_logprobs", "kl", "entropy", "values")
    count = sum(map(sum, holes))
    flat = {name: torch.randn(count, generator=generator) for name in names}
    rows = {name: with_holes(tensor, holes) for name, tensor in flat.items()}
    return Measurements(**flat), rows, torch.randn(len(holes), generator=generator)


def with_holes(flat, holes) -> list[list[float]]:
    numbers = iter(flat.tolist())
    return [[next(numbers) if own else math.nan for own in row] for row in holes]


def slow_gae(rewards, values, own, gamma, lam):
    advantages, following, advantage = [math.nan] * len(own), 0.0, 0.0
    for t in reversed(range(len(own))):
        if not own[t]:
            continue  # others' tokens take no time
        advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
        advantages[t], following = advantage, values[t]
    return advantages


def counted(rows) -> list[float]:
    return [number for row in rows for number in row if not math.isnan(number)]


def assert_same(flat, rows):
    torch.testing.assert_close(flat, torch.tensor(counted(rows)), atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(HOLES, st.booleans())
def test_rewards_advantages_and_whitening_are_those_of_the_oracle(holes, whitened):
    found, rows, scores = measured(holes)
    shaped = shaped_experience(episode_sequences(holes), scores, found, whitened=whitened, **GIVEN)
    rewards, advantages = [], []
    for number, own in enumerate(holes):
        last = max(t for t in range(len(own)) if own[t])
        mine = [-0.3 * kl + (scores[number].item() if t == last else 0.0) for t, kl in enumerate(rows["kl"][number])]
        rewards.append(mine)
        advantages.append(slow_gae(mine, rows["values"][number], own, 0.9, 0.8))
    returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, rows["values"], strict=True)]
    assert_same(shaped.rewards, rewards)
    assert_same(shaped.returns, returns)
    if whitened:
        numbers = counted(advantages)
        mean = sum(numbers) / len(numbers)
        std = (sum((number - mean) ** 2 for number in numbers) / len(numbers) + 1e-8) ** 0.5
        advantages = [[(number - mean) / std for number in row] for row in advantages]
    assert_same(shaped.advantages, advantages)
    metrics = experience_metrics(shaped, eos_token_ids=[1])
    assert metrics["kl/ref_mean"] == pytest.approx(sum(counted(rows["kl"])) / len(holes), abs=1e-4)
    assert metrics["response/length_mean"] == pytest.approx(sum(map(sum, holes)) / len(holes))
    turns = [sum(own and not before for before, own in zip([False, *row], row, strict=False)) for row in holes]
    assert metrics["response/turns_mean"] == pytest.approx(sum(turns) / len(holes))


def slow_weight(mean: str, holes, number: int, limit: int) -> float:
    if mean == "tokens":
        return 1 / sum(map(sum, holes))
    return 1 / (len(holes) * (sum(holes[number]) if mean == "responses" else limit))


@pytest.mark.parametrize("mean", ["tokens", "responses", "constant"])
@settings(deadline=None, max_examples=15)
@given(HOLES, st.integers(1, 3))
def test_the_policy_loss_is_the_mean_over_the_actors_tokens(tmp_path_factory, mean, holes, at_a_time):
    config = tiny.ppo_config(tmp_path_factory.mktemp("loss"), loss_mean=mean, rollout__max_response_tokens=12)
    found, rows, scores = measured(holes)
    experience = shaped_experience(episode_sequences(holes), scores, found, whitened=True, **GIVEN)
    objective = PolicyObjective(config, experience, kl_coef=0.3, penalty_coef=1.0, ref=None)
    new = found.logprobs + torch.randn(len(found.logprobs), generator=torch.Generator().manual_seed(5)) / 3
    loss = 0.0
    for part in torch.arange(len(holes)).flip(0).split(at_a_time):
        batch = experience.sequences.padded(part, torch.device("cpu"))
        given_ = TokenLogprobs(logprobs=new[batch.response_tokens], entropy=None, hidden=None)
        loss += objective.loss(None, given_, batch).item()
    wanted, advantages, news = 0.0, with_holes(experience.advantages, holes), with_holes(new, holes)
    for number, row in enumerate(holes):
        for t, own in enumerate(row):
            if own:
                ratio = math.exp(news[number][t] - rows["logprobs"][number][t])
                clipped = min(max(ratio, 0.8), 1.2)
                worse = max(-advantages[number][t] * ratio, -advantages[number][t] * clipped)
                wanted += worse * slow_weight(mean, holes, number, 12)
    assert loss == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logprobs_of_the_actors_tokens_are_those_of_a_plain_forward(family):
    model = load_language_model(tiny.MODELS[family], dtype=torch.float32).eval()
    holes = [[True, True, False, False, False, True, True], [True], [True, False, True, False, False, True]]
    sequences = episode_sequences(holes)
    rows = sequences.tokens.split(sequences.lengths.tolist())
    wanted = []
    for row, mask, prompt in zip(rows, holes, sequences.prompt_lengths.tolist(), strict=True):
        logprobs = model.model(input_ids=row[None]).logits[0].log_softmax(-1)
        wanted += [logprobs[prompt + t - 1, row[prompt + t]].item() for t, own in enumerate(mask) if own]
    for lay_out in (sequences.padded, sequences.packed):
        batch = lay_out(torch.arange(3), torch.device("cpu"))
        given_ = dict(temperature=1.0, chunk_tokens=4, position_ids=batch.position_ids)
        found = model(batch.input_ids, batch.positions, batch.targets, **given_).logprobs
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
