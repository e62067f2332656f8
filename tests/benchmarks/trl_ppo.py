"""The peer: TRL's PPO (trl.experimental.ppo) on the workload of workload.py, timed from outside.

    python tests/benchmarks/workload.py --variant eos --out /tmp/bench/eos
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 \\
        tests/benchmarks/trl_ppo.py --workload /tmp/bench/eos --out /tmp/bench/trl_eos.json

TRL computes exactly what it computes for any user: two of its functions are wrapped to read the clock, none is
replaced, and TRL 1.11.0 on transformers 5.23 needs no workaround. The settings are a user's choice for speed on a CPU
(see `ppo_config`). Nothing is saved, printed or evaluated.

Wall-clock time on shared cores is worth little by itself: `cpu_seconds_per_iteration` says what the work cost.

Phases of one iteration, which add up to it (mean over the ranks; the wait for the slower rank falls into `train`):
    generate   batch_generation: the responses, with the logits that TRL keeps for their log-probs
    score      from there to the first training forward: ref, critic and reward forwards, log-probs, rewards, GAE
    train      from there to the end of the step: forward, backward, all-reduce, optimizer, TRL's own statistics
    other      the rest: fetching the batch, garbage collection
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from workload import ModelFolders, Workload, prompts, read_workload


@dataclass
class IterationClock:
    """What this rank saw of one iteration: wall-clock times, CPU time of all its threads, response tokens."""

    start: float
    cpu_start: float
    generate_start: float = 0.0
    generate_end: float = 0.0
    train_start: float = 0.0
    end: float = 0.0
    cpu_end: float = 0.0
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)

    def phases(self) -> dict[str, float]:
        """Seconds per phase; they add up to `end - start`."""
        return {
            "generate": self.generate_end - self.generate_start,
            "score": self.train_start - self.generate_end,
            "train": self.end - self.train_start,
            "other": self.generate_start - self.start,
        }


@dataclass
class Stopwatch(TrainerCallback):
    """Times TRL's iterations: a callback for their ends, wrapped functions for the phases in between."""

    workload: Workload
    clocks: list[IterationClock] = field(default_factory=list)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.clocks.append(IterationClock(time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # The metrics' gather, a collective, is just behind: the ranks are together here.
        clock = self.clocks[-1]
        clock.end, clock.cpu_end = time.perf_counter(), time.process_time()
        self.clocks.append(IterationClock(clock.end, clock.cpu_end))

    def finished(self) -> list[IterationClock]:
        return self.clocks[:-1]

    def wrap(self, trainer: PPOTrainer) -> None:
        """Wraps the module's functions that `trainer.train` looks up by name."""
        batch_generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(model, queries, *args):
            clock = self.clocks[-1]
            clock.generate_start = time.perf_counter()
            query_responses, logits = batch_generation(model, queries, *args)
            clock.generate_end = time.perf_counter()
            clock.prompt_lengths = (queries != self.workload.pad_token_id).sum(1).tolist()
            clock.response_lengths = response_lengths(query_responses[:, queries.shape[1] :], self.workload)
            return query_responses, logits

        def timed_forward(model, *args):
            # The same function serves the ref; only the trained pair goes through the wrapper that DDP holds.
            if model is trainer.model and not self.clocks[-1].train_start:
                self.clocks[-1].train_start = time.perf_counter()
            return forward(model, *args)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward


def response_lengths(responses: torch.Tensor, workload: Workload) -> list[int]:
    """Tokens of each row of (B, R) `responses` up to and including its first EOS.

    Raises ValueError if a `fixed` batch is not all full-length, or if it holds a pad token, where TRL would cut it.
    """
    is_eos = responses == workload.eos_token_id
    lengths = ((is_eos.cumsum(1) - is_eos.long()) == 0).sum(1).tolist()
    count, expected = sum(lengths), responses.shape[0] * workload.max_new_tokens
    pads = int((responses == workload.pad_token_id).sum())
    if not workload.stops_at_eos and (count != expected or pads):
        raise ValueError(
            f"the fixed workload has {expected} response tokens a rank, TRL generated {count}, {pads} of them padding. "
            f"Write the models again with workload.py --variant fixed."
        )
    return lengths


def ppo_config(workload: Workload, *, iterations: int, micro_batch_size: int, seed: int, output_dir: str) -> PPOConfig:
    """The settings a TRL user would pick for speed here; each differs from TRL's default for the reason beside it."""
    if workload.prompts_per_rank % micro_batch_size:
        raise ValueError(
            f"--micro_batch_size {micro_batch_size} does not divide the {workload.prompts_per_rank} prompts of a rank. "
            f"Try {workload.prompts_per_rank}."
        )
    return PPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,  # on by default in TRL; the workload is fp32
        gradient_checkpointing=False,  # on by default in TRL; memory is not short here
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=workload.prompts_per_rank // micro_batch_size,
        num_mini_batches=1,  # with one epoch: one optimizer step per iteration
        num_ppo_epochs=workload.ppo_epochs,
        total_episodes=iterations * workload.num_prompts,
        local_rollout_forward_batch_size=workload.prompts_per_rank,  # generate and score a rank's prompts at once
        response_length=workload.max_new_tokens,
        temperature=workload.temperature,
        stop_token="eos" if workload.stops_at_eos else None,
        missing_eos_penalty=None,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


def build_trainer(folder: Path, workload: Workload, config: PPOConfig, stopwatch: Stopwatch) -> PPOTrainer:
    """TRL's trainer over the models in `folder`, with the stopwatch attached."""
    folders = ModelFolders.under(folder)
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folders.actor),
        model=AutoModelForCausalLM.from_pretrained(folders.actor, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(folders.actor, dtype=torch.float32),
        reward_model=AutoModelForSequenceClassification.from_pretrained(folders.critic, dtype=torch.float32),
        value_model=AutoModelForSequenceClassification.from_pretrained(folders.critic, dtype=torch.float32),
        train_dataset=Dataset.from_dict({"input_ids": prompts(workload)}),
        callbacks=[stopwatch],
    )
    trainer.remove_callback(PrinterCallback)
    stopwatch.wrap(trainer)
    return trainer


def report(ranks: list[dict], workload: Workload, *, warmup: int, micro_batch_size: int) -> dict:
    """The JSON object: per-iteration lists hold the iterations after the warm-up."""
    clocks = list(zip(*(rank["clocks"] for rank in ranks), strict=True))[warmup:]  # [iteration][rank]
    seconds = [max(clock.end - clock.start for clock in iteration) for iteration in clocks]
    # Far below `seconds` on both ranks: something else had the cores, so the run should be repeated.
    cpu_seconds = [max(clock.cpu_end - clock.cpu_start for clock in iteration) for iteration in clocks]
    lengths = {
        name: [[length for clock in iteration for length in getattr(clock, name)] for iteration in clocks]
        for name in ("prompt_lengths", "response_lengths")
    }
    phases = {
        phase: [statistics.fmean(clock.phases()[phase] for clock in iteration) for iteration in clocks]
        for phase in ("generate", "score", "train", "other")
    }
    return {
        "side": "trl",
        "workload": workload.name,
        "ranks": workload.world_size,
        "seconds_per_iteration": seconds,
        "cpu_seconds_per_iteration": cpu_seconds,
        "phases": phases,
        **lengths,
        "peak_rss_gib": [rank["peak_rss_gib"] for rank in ranks],
        "warmup_iterations": warmup,
        "micro_batch_size": micro_batch_size,
        "threads_per_rank": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="a folder written by workload.py")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--iterations", type=int, default=7, help="in all, the warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first iterations to leave out")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="responses per training forward, one rank")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling and the order of prompts")
    args = parser.parse_args()
    if not 0 <= args.warmup < args.iterations:
        raise ValueError(f"--warmup {args.warmup} leaves nothing of --iterations {args.iterations}")
    workload = read_workload(args.workload)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != workload.world_size:
        raise ValueError(f"the workload is for {workload.world_size} ranks, this run has {world_size}. Use torchrun.")

    stopwatch = Stopwatch(workload)
    with tempfile.TemporaryDirectory() as output_dir:
        config = ppo_config(
            workload,
            iterations=args.iterations,
            micro_batch_size=args.micro_batch_size,
            seed=args.seed,
            output_dir=output_dir,
        )
        build_trainer(args.workload, workload, config, stopwatch).train()

    # ru_maxrss is in KiB on Linux.
    peak_rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ranks: list[dict] = [{} for _ in range(world_size)]
    dist.all_gather_object(ranks, {"clocks": stopwatch.finished(), "peak_rss_gib": peak_rss_gib})
    if dist.get_rank() == 0:
        result = report(ranks, workload, warmup=args.warmup, micro_batch_size=args.micro_batch_size)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
