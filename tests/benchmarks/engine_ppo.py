"""Our side of the benchmark: PPO iterations of the engine on a workload folder, timed by phase.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \\
        tests/benchmarks/engine_ppo.py --workload DIR --out FILE.json

Writes the same JSON object as `trl_ppo.py`, and with it this machine's rate of matrix products, measured on all ranks
at once between the warm-up and the first timed iteration. A phase's time is the slowest rank's; each of the three ends
with a collective.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from workload import ModelFolders, Workload, as_text, prompts, read_workload

from engine.algorithms.matrix_products import linear
from engine.config import (
    CriticConfig,
    DataConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    SteadyLoRAConfig,
    TrackingConfig,
    TrainedRoleConfig,
)
from engine.data import PromptBatch
from engine.distributed import comm
from engine.models.loading import load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer

PHASES = ("generate", "score", "train")


@dataclass(frozen=True)
class Timing:
    """One iteration, the slowest rank's numbers."""

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    prompt_lengths: list[int]
    response_lengths: list[int]


def ppo_config(
    folder: Path,
    workload: Workload,
    *,
    zero_stage: int,
    micro_batch_size: int,
    seed: int,
    output_dir: str,
    shared_trunk: bool = False,
    dtype: str = "float32",
) -> PPOConfig:
    """One optimizer step per iteration on all responses; TRL's learning rate, KL coefficient, and log-probs of the
    rollout's own (in 16 bits they are computed again).
    """
    models = ModelFolders.under(folder)
    lora = SteadyLoRAConfig(r=8) if shared_trunk else None
    return PPOConfig(
        actor=TrainedRoleConfig(model_name_or_path=str(models.actor), learning_rate=3e-6, lora=lora),
        critic=CriticConfig(learning_rate=3e-6),
        reward=RewardConfig(model_name_or_path=str(models.reward_adapter if shared_trunk else models.critic)),
        shared_trunk=shared_trunk,
        data=DataConfig(train="handed over", max_prompt_tokens=workload.max_prompt_tokens),
        rollout=RolloutConfig(
            max_response_tokens=workload.max_new_tokens,
            min_response_tokens=0 if workload.stops_at_eos else workload.max_new_tokens,
            temperature=workload.temperature,
            logprobs="drawn" if dtype == "float32" else "recomputed",
        ),
        tracking=TrackingConfig(wandb="disabled"),
        output_dir=output_dir,
        seed=seed,
        zero_stage=zero_stage,
        dtype=dtype,
        rollout_batch_size=workload.num_prompts,
        minibatch_size=workload.num_prompts,
        micro_batch_size=micro_batch_size,
        ppo_epochs=workload.ppo_epochs,
        kl_coef=0.05,
        kl_estimator="k1",
    )


def build_trainer(config: PPOConfig, iterations: int) -> DeepSpeedPPOTrainer:
    """The engine's four models and its trainer. A collective."""
    config.check_world_size(comm.world_size())
    actor = config.model_of("actor")
    engine = DeepSpeedRLHFEngine(actor, config.model_of("critic"), load_tokenizer(actor), iterations, config)
    return DeepSpeedPPOTrainer(engine, config)


def my_prompts(workload: Workload) -> PromptBatch:
    """This rank's share, the same in every iteration."""
    tokens = prompts(workload)
    mine = torch.arange(len(tokens)).tensor_split(comm.world_size())[comm.rank()].tolist()
    texts = [as_text(tokens[row]) for row in mine]
    return PromptBatch(prompts=texts, tokens=[tokens[row] for row in mine], texts=texts, ids=mine, columns={})


def timed_iteration(trainer: DeepSpeedPPOTrainer, batch: PromptBatch) -> Timing:
    """One iteration, from all ranks together to all ranks done. A collective."""
    comm.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    experience = trainer.generate_experience(batch)
    trainer.train_on(experience)
    trainer.metrics(experience)
    comm.barrier()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if trainer.progress.skipped_steps:
        raise RuntimeError("an optimizer step was skipped: this iteration did less than the benchmark counts")
    return Timing(
        seconds=comm.max_over_ranks(seconds),
        cpu_seconds=comm.max_over_ranks(cpu_seconds),
        phases={phase: comm.max_over_ranks(trainer.seconds[phase]) for phase in PHASES},
        prompt_lengths=experience.sequences.prompt_lengths.tolist(),
        response_lengths=experience.sequences.response_lengths.tolist(),
    )


def matmul_gflops(dtype: torch.dtype, seconds: float = 4.0) -> float:
    """GFLOP/s of large matrix products, all ranks together and at once: each rank's median, with the library that the
    engine takes. A collective.

    What the processor keeps up: on a CPU the best single product, for which a core runs alone or faster than it can for
    long, is a fifth quicker. There 768^3 takes 8 ms at 110 GFLOP/s; where other programs take turns on the cores, most
    are undisturbed.
    """
    comm.barrier()
    on_gpu = comm.device().type == "cuda"
    size = 8192 if on_gpu else 768
    a, b = (torch.randn(size, size, device=comm.device()).to(dtype) for _ in range(2))
    times, deadline = [], time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        linear(a, b)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    rate = torch.tensor(2 * size**3 / statistics.median(times) / 1e9, device=comm.device())
    return comm.sum_over_ranks(rate).item()


def device_name() -> str:
    return torch.cuda.get_device_name() if comm.device().type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="a folder written by workload.py")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--iterations", type=int, default=7, help="in all, the warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first iterations to leave out")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="full-length responses per forward, one rank")
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--shared_trunk", action="store_true", help="one model with adapters in the place of four")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    args = parser.parse_args()
    if not 0 <= args.warmup < args.iterations:
        raise ValueError(f"--warmup {args.warmup} leaves nothing of --iterations {args.iterations}")

    comm.init_distributed()
    workload = read_workload(args.workload).on(comm.world_size())
    with tempfile.TemporaryDirectory() as output_dir:
        config = ppo_config(
            args.workload,
            workload,
            zero_stage=args.zero_stage,
            shared_trunk=args.shared_trunk,
            dtype=args.dtype,
            micro_batch_size=args.micro_batch_size,
            seed=args.seed,
            output_dir=output_dir,
        )
        trainer, batch = build_trainer(config, args.iterations), my_prompts(workload)
        for _ in range(args.warmup):
            timed_iteration(trainer, batch)
        rate = matmul_gflops(getattr(torch, args.dtype))
        timings = [timed_iteration(trainer, batch) for _ in range(args.iterations - args.warmup)]
    peaks = comm.gathered_objects(comm.peak_memory_gib())
    if comm.is_main():
        result = {
            "side": "engine",
            "workload": workload.name,
            "ranks": comm.world_size(),
            "zero_stage": args.zero_stage,
            "shared_trunk": args.shared_trunk,
            "dtype": args.dtype,
            "device": device_name(),
            "seconds_per_iteration": [timing.seconds for timing in timings],
            "cpu_seconds_per_iteration": [timing.cpu_seconds for timing in timings],
            "phases": {phase: [timing.phases[phase] for timing in timings] for phase in PHASES},
            "prompt_lengths": [timing.prompt_lengths for timing in timings],
            "response_lengths": [timing.response_lengths for timing in timings],
            "peak_rss_gib": peaks,
            "matmul_gflops": rate,
            "warmup_iterations": args.warmup,
            "micro_batch_size": args.micro_batch_size,
            "threads_per_rank": torch.get_num_threads(),
            "versions": comm.versions(),
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    comm.shutdown()


if __name__ == "__main__":
    main()
