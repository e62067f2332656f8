"""Loops that users hold themselves: generate, reward_scores and step do what the trainer's own loop does."""

import pytest
import tiny
import torch
from runs import UNCOMPARABLE, Log, build, digest

from engine.distributed import comm


def own_loop(config, as_tensors):
    """The trainer's first iteration, and the same one given to `step` by hand."""
    trainer, prompts = build(config)
    batch = next(iter(prompts))
    experience = trainer.generate_experience(batch)
    whole = [row.tolist() for row in experience.sequences.tokens.split(experience.sequences.lengths.tolist())]
    rows = list(zip(whole, experience.sequences.prompt_lengths.tolist(), strict=True))
    share = torch.arange(len(rows)).tensor_split(comm.world_size())[comm.rank()].tolist()
    queries, answers = [rows[n][0][: rows[n][1]] for n in share], [rows[n][0][rows[n][1] :] for n in share]
    trainer.train_on(experience)
    wanted = {name: value for name, value in trainer.metrics(experience).items() if not name.startswith(UNCOMPARABLE)}
    first = digest(trainer.actor)

    other, _ = build(config)
    if as_tensors:
        queries, answers = [torch.tensor(row) for row in queries], [torch.tensor(row) for row in answers]
    scores = other.rlhf_engine.reward_scores(queries, answers)
    found = {
        name: value for name, value in other.step(queries, answers, scores).items() if not name.startswith(UNCOMPARABLE)
    }
    return wanted, found, first == digest(other.actor)


@pytest.mark.parametrize(("kind", "as_tensors"), [(0, False), ("strict", True)])
def test_a_step_by_hand_is_the_trainers_own(run_ranks, ppo_config, tmp_path, kind, as_tensors):
    config = ppo_config(**tiny.sharding(kind, tmp_path))
    for wanted, found, same_weights in run_ranks(own_loop, config, as_tensors):
        assert found == wanted and same_weights


def drawn(config):
    trainer, _ = build(config)
    mine = [[5, 6, 7], [5, 6, 7]] if comm.rank() == 0 else [[5, 6, 7]]
    return trainer.generate(mine)


def test_the_same_query_draws_different_responses_on_a_rank_and_on_another(run_ranks, ppo_config, strict_z3):
    first, second = run_ranks(drawn, ppo_config(ds_config=strict_z3))
    assert (len(first), len(second)) == (2, 1)
    assert len({tuple(response) for response in (*first, *second)}) == 3
    assert all(1 <= len(response) <= 12 for response in (*first, *second))


def learned(config):
    """Twelve iterations of a loop that likes the letters a to m."""
    trainer, _ = build(config)
    tokenizer, history, log = trainer.tokenizer, [], Log()
    for _ in range(12):
        queries = [tokenizer(prompt)["input_ids"] for prompt in tiny.PROMPTS[comm.rank() :: comm.world_size()] * 4]
        responses = trainer.generate(queries)
        texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
        stats = trainer.step(queries, responses, tiny.share_of_small_letters(queries, texts))
        log.log(trainer.progress.iteration, stats, [])
        history.append(stats["score/mean"])
    return history


def test_a_loop_of_ones_own_learns(run_ranks, ppo_config):
    given = dict(rollout_batch_size=32, minibatch_size=16, micro_batch_size=8, num_iterations=12, kl_coef=0.01)
    first, second = run_ranks(learned, ppo_config(**given, actor__learning_rate=5e-3, critic__learning_rate=5e-3))
    assert first == second
    assert sum(first[-3:]) > 2 * sum(first[:3])


def refusals(config):
    trainer, _ = build(config)
    given = [
        ([[5]], [[6]], [1.0, 2.0]),
        ([[5]], [[6] * 99], [1.0]),
        ([[5]] * (1 + comm.rank()), [[6]], [1.0]),
        ([[]], [[6]], [1.0]),
        ([[5]], [[6]], ["good"] if comm.rank() else [1.0]),
        ([[5]], [[6 + 10_000 * comm.rank()]], [1.0]),
    ]
    said = []
    for arguments in given:
        try:
            trainer.step(*arguments)
        except ValueError as error:
            said.append(str(error))
    return said


def other_refusals(config):
    """Of what only rank 1 gets wrong."""
    trainer, _ = build(config)
    mine = comm.rank() == 1
    calls = [
        lambda: trainer.generate([[]] if mine else [[5]]),
        lambda: trainer.generate([[5] * 99] if mine else [[5]]),
        lambda: trainer.rlhf_engine.reward_scores([[5]] * (2 if mine else 1), [[6]]),
        lambda: trainer.rlhf_engine.reward_scores([[5]], [[10_000 if mine else 6]]),
        lambda: trainer.step([[5], [5 + mine]], [[6], [6]], [1.0, 2.0]),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_one_rank_gets_wrong_is_refused_on_all(run_ranks, ppo_config):
    config = ppo_config(advantage_estimator="rloo", rollout__samples_per_prompt=2)
    first, second = run_ranks(other_refusals, config)
    assert first == second and len(first) == 5
    parts = ("without tokens", "99 tokens", "2 queries and 1 responses", "token id outside", "to one query")
    for message, part in zip(first, parts, strict=True):
        assert part in message


def test_lists_that_do_not_fit_are_refused_on_all_ranks(run_ranks, ppo_config):
    first, second = run_ranks(refusals, ppo_config())
    assert first == second and len(first) == 6
    parts = (
        "2 scores",
        "100 tokens",
        "on rank 1 of 2: step",
        "without tokens",
        "not a list of numbers",
        "token id outside",
    )
    for message, part in zip(first, parts, strict=True):
        assert part in message
