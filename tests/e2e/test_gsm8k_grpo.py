"""GRPO on the problems of GSM8K, exact match, two ranks. A tiny model does not learn arithmetic; what is shown is that
every score belongs to its own problem, every group to one prompt, and every advantage to a token of its response."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from runs import build

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
SAMPLES = 16


def short_problems() -> list[dict[str, str]]:
    """Eight whose answer is one digit, which a random model of bytes hits now and then."""
    rows = (json.loads(line) for line in GSM8K.open())
    return [row for row in rows if re.search(r"#### \d$", row["answer"]) and len(row["question"]) < 150][:8]


def one_iteration(config):
    """Everything that the test looks at, of one iteration, as this rank sees it."""
    trainer, prompts = build(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    sequences = experience.sequences
    rows = []
    for row in sequences.tokens.split(sequences.lengths.tolist()):
        rows.append(row.tolist())
    trainer.train_on(experience)
    return {
        "rows": rows,
        "prompt_lengths": sequences.prompt_lengths.tolist(),
        "prompts": [trainer.tokenizer.decode(r[:n]) for r, n in zip(rows, sequences.prompt_lengths, strict=True)],
        "responses": trainer.scoring.texts([r[n:] for r, n in zip(rows, sequences.prompt_lengths, strict=True)]),
        "eos": trainer.eos_token_ids,
        "scores": experience.scores,
        "advantages": experience.advantages,
        "response_lengths": sequences.response_lengths.tolist(),
        "metrics": trainer.metrics(experience),
    }


def exact(response: str, answer: str) -> float:
    """Digits alone: enough for these problems' answers."""
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+", response)
    said = numbers[-1].replace("$", "").replace(",", "") if numbers else ""
    return float(bool(said) and float(said) == float(answer.split("#### ")[1]))


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}")
@pytest.mark.parametrize("kind", [2, "strict"])
def test_scores_groups_and_masks_are_right(run_ranks, tmp_path, kind):
    problems = short_problems()
    config = tiny.ppo_config(
        tmp_path,
        reward__function="engine.scores:final_number",
        data__train=tiny.write_rows(tmp_path / "gsm8k.jsonl", problems),
        data__max_prompt_tokens=256,
        rollout__samples_per_prompt=SAMPLES,
        advantage_estimator="grpo",
        kl_placement="loss",
        kl_estimator="k3",
        loss_mean="responses",
        rollout_batch_size=8 * SAMPLES,
        minibatch_size=64,
        micro_batch_size=16,
        num_iterations=1,
        **tiny.sharding(kind, tmp_path),
    )
    one, other = run_ranks(one_iteration, config)
    assert one["rows"] == other["rows"] and torch.equal(one["advantages"], other["advantages"])
    answers = {problem["question"]: problem["answer"] for problem in problems}
    found = [next(q for q in answers if q in prompt) for prompt in one["prompts"]]
    assert sorted(found) == sorted(q for q in answers for _ in range(SAMPLES)), "every problem, as often as asked for"
    wanted = torch.tensor([exact(said, answers[q]) for said, q in zip(one["responses"], found, strict=True)])
    assert torch.equal(one["scores"], wanted) and 0 < wanted.sum() < len(wanted), "some are hit by chance"
    advantages = one["advantages"].split(one["response_lengths"])
    for group in range(8):
        rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
        assert len(set(found[rows])) == 1
        mean, std = wanted[rows].mean(), wanted[rows].std()
        for row, flat in enumerate(advantages[rows]):
            expected = (wanted[rows][row] - mean) / std if std > 0 else torch.tensor(0.0)
            torch.testing.assert_close(flat, expected.expand(len(flat)), rtol=1e-3, atol=1e-5)
    for row, n, length in zip(one["rows"], one["prompt_lengths"], one["response_lengths"], strict=True):
        response = row[n:]
        assert len(response) == length and (length == 12 or response[-1] in one["eos"])
        assert not set(response[:-1]) & set(one["eos"]), "nothing after the end"
    assert one["metrics"]["score/mean"] == pytest.approx(wanted.mean().item())
    assert one["metrics"]["skipped/steps"] == 0 and one["metrics"]["grad_norm/actor"] > 0
