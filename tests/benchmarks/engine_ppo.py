"""Our side of the benchmark: PPO iterations of the engine on a workload folder, timed by phase.

    python -m torch.distributed.run --nproc_per_node 2 tests/benchmarks/engine_ppo.py --workload DIR --out FILE.json

Writes the same JSON object as `trl_ppo.py`, and with it this machine's rate of matrix products, measured on all ranks
at once between the warm-up and the first timed iteration.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from workload import ModelFolders, as_text, prompts, read_workload

from engine.config import (
    DataConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    TrackingConfig,
    TrainedRoleConfig,
)
from engine.data import PromptBatch
from engine.distributed import comm
from engine.models.loading import load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer

PHASES = ("generate", "score", "train")


def ppo_config(folder: Path, workload, *, zero_stage: int, micro_batch_size: int, output_dir: str) -> PPOConfig:
    """One optimizer step per iteration on all responses; TRL's learning rate and KL coefficient."""
    models = ModelFolders.under(folder)
    return PPOConfig(
        actor=TrainedRoleConfig(model_name_or_path=str(models.actor), learning_rate=3e-6),
        critic=TrainedRoleConfig(learning_rate=3e-6),
        reward=RewardConfig(model_name_or_path=str(models.critic)),
        data=DataConfig(train="handed over", max_prompt_tokens=workload.max_prompt_tokens),
        rollout=RolloutConfig(
            max_response_tokens=workload.max_new_tokens,
            min_response_tokens=0 if workload.stops_at_eos else workload.max_new_tokens,
            temperature=workload.temperature,
        ),
        tracking=TrackingConfig(wandb="disabled"),
        output_dir=output_dir,
        zero_stage=zero_stage,
        dtype="float32",
        rollout_batch_size=workload.num_prompts,
        minibatch_size=workload.num_prompts,
        micro_batch_size=micro_batch_size,
        ppo_epochs=workload.ppo_epochs,
    )


def matmul_gflops(seconds: float = 3.0, size: int = 1024) -> float:
    """GFLOP/s of fp32 matrix products on this rank while the others do the same: the best of many."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="a folder written by workload.py")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--iterations", type=int, default=6, help="in all, the warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first iterations to leave out")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="full-length responses per forward, one rank")
    parser.add_argument("--zero_stage", type=int, default=0)
    args = parser.parse_args()

    comm.init_distributed()
    workload = read_workload(args.workload)
    with tempfile.TemporaryDirectory() as output_dir:
        config = ppo_config(
            args.workload,
            workload,
            zero_stage=args.zero_stage,
            micro_batch_size=args.micro_batch_size,
            output_dir=output_dir,
        )
    tokenizer = load_tokenizer(config.model_of("actor"))
    engine = DeepSpeedRLHFEngine(
        config.model_of("actor"), config.model_of("critic"), tokenizer, args.iterations, config
    )
    trainer = DeepSpeedPPOTrainer(engine, config)
    tokens = prompts(workload)
    mine = torch.arange(len(tokens)).tensor_split(comm.world_size())[comm.rank()].tolist()
    batch = PromptBatch(
        tokens=[tokens[row] for row in mine], texts=[as_text(tokens[row]) for row in mine], ids=mine, columns={}
    )

    iterations, rate = [], 0.0
    for number in range(args.iterations):
        if number == args.warmup:
            comm.barrier()
            rate = comm.sum_over_ranks(torch.tensor(matmul_gflops())).item()
        comm.barrier()
        started = time.perf_counter()
        experience = trainer.generate_experience(batch)
        trainer.train_on(experience)
        comm.barrier()
        trainer.progress.iteration += 1
        seconds = comm.max_over_ranks(time.perf_counter() - started)
        if number >= args.warmup:
            phases = {phase: comm.max_over_ranks(trainer.seconds[phase]) for phase in PHASES}
            lengths = experience.sequences
            iterations.append((seconds, phases, lengths.prompt_lengths.tolist(), lengths.response_lengths.tolist()))
    peaks = comm.gathered_objects(comm.peak_memory_gib())
    if comm.is_main():
        seconds = [row[0] for row in iterations]
        response_tokens = [sum(row[3]) for row in iterations]
        result = {
            "side": "engine",
            "workload": workload.name,
            "zero_stage": args.zero_stage,
            "ranks": comm.world_size(),
            "seconds_per_iteration": seconds,
            "median_seconds_per_iteration": statistics.median(seconds),
            "phases": {phase: [row[1][phase] for row in iterations] for phase in PHASES},
            "prompt_lengths": [row[2] for row in iterations],
            "response_lengths": [row[3] for row in iterations],
            "response_tokens": response_tokens,
            "response_tokens_per_second": sum(response_tokens) / sum(seconds),
            "peak_rss_gib": peaks,
            "matmul_gflops": rate,
            "micro_batch_size": args.micro_batch_size,
            "threads_per_rank": torch.get_num_threads(),
            "versions": comm.versions(),
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    comm.shutdown()


if __name__ == "__main__":
    main()
