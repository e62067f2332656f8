"""Train an actor and a critic by PPO against a frozen ref and a frozen source of scores.

    deepspeed --num_accelerators 2 launch/train_ppo.py --config launch/recipes/gsm8k_tiny.yaml --output_dir runs/ppo

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, memory_plan.json, metrics.jsonl,
samples.jsonl, checkpoints/ and the exported actor/ and critic/ to the output folder. `--resume auto` goes on.
"""

import shutil
from functools import partial
from pathlib import Path

from engine.config import PPOConfig, parse, run
from engine.data import create_datasets, create_pretraining_dataset
from engine.distributed import comm
from engine.distributed.run import Run
from engine.memory_plan import planned_peak_gib, with_stages_chosen
from engine.models.loading import content_digest, load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.environments import load_environment
from engine.rollout.score_functions import load_score_function
from engine.tracking import Tracker
from engine.trainers.checkpoints import Checkpoints
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer


def main() -> None:
    config = parse(PPOConfig)
    with Run(config) as this_run:
        train(with_stages_chosen(config), this_run)


def train(config: PPOConfig, this_run: Run) -> None:
    with comm.same_error_everywhere():
        if config.reward.function is not None:
            load_score_function(config.reward.function)  # a wrong name is told before models are built
        if config.rollout.environment is not None:
            load_environment(config.rollout.environment)
        tokenizer = load_tokenizer(config.models["actor"], chat_template=config.data.chat_template)
        prompts, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=3)
        pretraining = create_pretraining_dataset(config, tokenizer)
        contents = {f"the {role}'s weights": content_digest(name) for role, name in config.models.items()}
    contents |= {"the prompts": prompts.dataset.digest, "the prompts' columns": prompts.dataset.columns_digest}
    contents["the demonstrations"] = pretraining and pretraining.dataset.examples.digest
    comm.check_same_everywhere(contents)
    planned = planned_peak_gib(config)
    rlhf_engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=config.models["actor"],
        critic_model_name_or_path=config.models["critic"],
        tokenizer=tokenizer,
        num_total_iters=num_iterations,
        args=config,
    )
    if comm.is_main():
        sizes = ", ".join(f"{role} {size / 2**20:.1f}" for role, size in rlhf_engine.parameter_bytes().items())
        print(f"Weights in memory, MiB: {sizes}", flush=True)
        for name, why in config.without_effect.items():
            print(f"Note: {name} has no effect in this run: {why}.", flush=True)
    told = this_run.watch.tell
    trainer = DeepSpeedPPOTrainer(rlhf_engine, config, pretraining, on_phase=told, planned_gib=planned)
    checkpoints = Checkpoints(config, rlhf_engine.trained, contents=contents, stop=this_run.stop, on_phase=told)
    new_tracker = partial(Tracker, config, num_iterations=num_iterations, is_main=comm.is_main())
    with checkpoints.go_on(trainer, num_iterations, new_tracker) as tracker:
        if trainer.train(prompts, num_iterations, tracker, checkpoints):
            exported = export(rlhf_engine, config)
            if comm.is_main():
                print(f"Done: {num_iterations} iterations. Metrics, samples, {exported}: {config.output_dir}")


def export(rlhf_engine: DeepSpeedRLHFEngine, config: PPOConfig) -> str:
    """Write the trained models, and remove those of an earlier run that this one does not have."""
    output_dir = Path(config.output_dir)
    written = rlhf_engine.export(output_dir)
    for name in {"actor", "actor_ema", "critic"} - set(written) if comm.is_main() else ():
        shutil.rmtree(output_dir / name, ignore_errors=True)
    return ", ".join(written)


if __name__ == "__main__":
    run(main)
