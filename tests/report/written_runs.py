"""Folders of runs, written in the form that a run leaves them in: numbers made up, every file there."""

import json
import math
import random
from pathlib import Path
from typing import Any

from engine.tracking.files import as_line

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> <!-- &lt; $title ${data}"
PROMPTS = ["Who painted the Night Watch?", "Where was Ada Vell born?", HOSTILE, "من كتب هذا الكتاب؟ 🙂👩🏽‍🚀"]
LONG_WORD = "Donau" + "dampfschiff" * 60
RESPONSES = [
    "Rembrandt van Rijn painted it, in 1642.",
    "I don't know.",
    f"{HOSTILE} and\na second line\u2028of text",
    LONG_WORD,
]
GIB = 2**30


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(as_line(row) for row in rows), encoding="utf-8")


def ppo_metrics(iteration: int, iterations: int, noise: random.Random) -> dict[str, float]:
    """The metrics of an iteration; that of policy/ratio_max is not finite in every tenth."""
    done = iteration / iterations
    rising = 1 / (1 + math.exp(6 * (0.4 - done)))
    return {
        "score/mean": 0.3 + 0.6 * rising + noise.gauss(0, 0.02),
        "score/std": 0.35 - 0.2 * done,
        "score/failed": 0,
        "reward/kl_penalty": -0.05 * done,
        "kl/ref_mean": 1.6 * rising + abs(noise.gauss(0, 0.05)),
        "kl/coef": 0.03,
        "loss/policy": -0.02 + noise.gauss(0, 0.005),
        "loss/value": 0.4 * math.exp(-3 * done) + 0.02,
        "policy/clip_fraction": 0.08 + noise.gauss(0, 0.01),
        "policy/approx_kl": 0.004,
        "policy/ratio_max": math.nan if iteration % 10 == 0 else 1.4 + noise.random(),
        "policy/first_log_ratio_max": 0.0,
        "policy/entropy": 2.2 - done,
        "value/explained_variance": 0.8 * rising,
        "value/clip_fraction": 0.02,
        "response/length_mean": 12 + 4 * done + noise.gauss(0, 0.4),
        "response/eos_fraction": min(1.0, 0.9 + 0.1 * done),
        "grad_norm/actor": 0.9 + noise.random() * 0.2,
        "grad_norm/critic": 2.0 + noise.random(),
        "lr/actor": 2.5e-4 * (1 - done),
        "lr/critic": 3e-4,
        "skipped/steps": 0,
        "time/generate_s": 4.1 + noise.random(),
        "time/score_s": 1.2 + 0.2 * noise.random(),
        "time/train_s": 6.0 + noise.random(),
        "speed/response_tokens_per_s": 830 + noise.gauss(0, 30),
        "memory/peak_gib": 21.5,
        "memory/planned_gib": 22.8,
    }


def write_run(folder: Path, *, iterations: int = 30, seed: int = 0, num_iterations: int | None = None) -> Path:
    """A PPO run with every file that a run can have."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)
    rows = [{"iteration": i, **ppo_metrics(i, iterations, noise)} for i in range(1, iterations + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    write_beside(folder, iterations=iterations, seed=seed)
    (folder / "config.yaml").write_text(
        f"output_dir: {folder.name}\nactor:\n  model_name_or_path: tiny/actor-{seed}\n  learning_rate: 0.00025\n"
        f"seed: {seed}\nnum_iterations: {num_iterations or iterations}\nhostile: '</script><b>{{'\n"
    )
    return folder


def write_beside(folder: Path, *, iterations: int, seed: int = 0) -> None:
    """What stands beside metrics.jsonl and config.yaml."""
    noise = random.Random(seed)
    looked_at = range(1, iterations + 1)
    texts = list(zip(PROMPTS, RESPONSES, strict=True))
    write_lines(
        folder / "samples.jsonl",
        [
            {"iteration": i, "prompt": prompt, "response": f"({i}) {said}", "score": 0.25 * row, "kl": 0.1, "length": 9}
            for i in looked_at
            for row, (prompt, said) in enumerate(texts)
        ],
    )
    every = [0, *range(10, iterations + 1, 10)]
    share = [i / max(iterations, 1) for i in every]
    write_lines(
        folder / "evaluation.jsonl",
        [
            {
                "iteration": i,
                "eval/score_mean": 0.3 + 0.5 * done,
                "eval/score_std": 0.3,
                "eval/win_rate": 0.5 + 0.35 * done,
                "eval/kl_ref_mean": 1.5 * done,
                "eval/length_mean": 12 + 3 * done,
                "eval/eos_fraction": 0.95,
            }
            for i, done in zip(every, share, strict=True)
        ],
    )
    write_lines(
        folder / "evaluation_samples.jsonl",
        [
            {
                "iteration": i,
                "prompt": prompt,
                "response": f"[{i}] {said}",
                "score": 0.4 + 0.1 * row * done,
                "kl": done,
                "length": 9,
                "initial_response": "I was born in 1642.",
                "initial_score": 0.5,
            }
            for i, done in zip(every, share, strict=True)
            for row, (prompt, said) in enumerate(texts)
        ],
    )
    tokens = [
        "I",
        " don",
        "'t",
        " know",
        ",",
        " but",
        " <b>",
        " it",
        "\n",
        " is",
        " 🙂",
        " likely",
        " in",
        " Delft",
        ".",
    ]
    write_lines(folder / "token_views.jsonl", [token_view(i, tokens, noise) for i in looked_at])
    write_lines(
        folder / "warnings.jsonl",
        [{"iteration": 4, "warning": "no end", "sentence": "1% of the responses end by themselves: <i>why</i>?"}],
    )
    versions = {"python": "3.11.9", "torch": "2.13.0", "deepspeed": "0.19.8", "git_commit": None, "device": "H100"}
    (folder / "versions.json").write_text(json.dumps(versions | {"world_size": 2, "started": "2026-11-22T10:00:00"}))
    role = {"zero_stage": 2, "parameters": 494_000_000, "weights_bytes": GIB, "gradients_bytes": GIB}
    parts = {"weights": 4 * GIB, "optimizer": 6 * GIB}
    phases = {
        "load": parts,
        "generate": parts | {"KV cache": 3 * GIB},
        "score": parts | {"activations": 2 * GIB, "logits chunk": GIB},
        "train": parts | {"gradients": 2 * GIB, "activations": 8 * GIB, "logits chunk": GIB},
    }
    plan = {
        "world_size": 2,
        "device": "cuda",
        "roles": {name: role | {"optimizer_bytes": 6 * GIB} for name in ("actor", "critic")},
        "phases": {name: {"peak_bytes": sum(sizes.values()), "parts": sizes} for name, sizes in phases.items()},
        "peak_bytes": sum(phases["train"].values()),
    }
    (folder / "memory_plan.json").write_text(json.dumps(plan))


def token_view(iteration: int, tokens: list[str], noise: random.Random) -> dict[str, Any]:
    """One response, its numbers drawn; the first token's advantage is that of none other."""
    drawn = {name: [noise.gauss(0, 1) for _ in tokens] for name in ("kl", "values", "advantages")}
    below_zero = {name: [-noise.expovariate(1) for _ in tokens] for name in ("logprobs", "ref_logprobs")}
    rewards = [0.0] * (len(tokens) - 1) + [0.8]
    given = {"iteration": iteration, "prompt": PROMPTS[2], "score": 0.8, "tokens": tokens}
    return given | drawn | below_zero | {"rewards": rewards}
