"""Train an actor and a critic by PPO against a frozen ref and a frozen source of scores.

    deepspeed --num_accelerators 2 launch/train_ppo.py --config launch/recipes/gsm8k_tiny.yaml --output_dir runs/ppo

Also under torchrun, and as plain `python` for one rank. Writes the settings, the memory plan, metrics and samples,
checkpoints/ and the exported actor/ and critic/ to the output folder. `--resume auto` goes on with a run that ended.
"""

import shutil
from functools import partial
from pathlib import Path

import engine.startup  # noqa: F401 - first
from engine.config import PPOConfig, parse, run
from engine.data import create_datasets, create_eval_dataset, create_pretraining_dataset
from engine.distributed import comm
from engine.distributed.run import Run
from engine.memory_plan import planned_peak_gib, with_stages_chosen
from engine.models.loading import load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.environments import load_environment
from engine.rollout.score_functions import load_score_function
from engine.tracking import Tracker
from engine.trainers.banner import ppo_banner, print_banner
from engine.trainers.checkpoints import Checkpoints, contents_of
from engine.trainers.evaluation import load_metrics
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer


def main() -> None:
    config = parse(PPOConfig)
    with Run(config) as this_run:
        train(with_stages_chosen(config), this_run)


def train(config: PPOConfig, this_run: Run) -> None:
    with comm.same_error_everywhere():
        if config.reward.function is not None:
            load_score_function(config.reward.function)  # a wrong name is told before models are built
        load_environment(config.rollout.environment)
        load_metrics(config.evaluation)
        tokenizer = load_tokenizer(config.models["actor"], chat_template=config.data.chat_template)
        prompts, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=3)
        held_out = create_eval_dataset(config, tokenizer, train_phase=3)
        pretraining = create_pretraining_dataset(config, tokenizer)
        contents = contents_of(config, prompts.dataset, held_out, pretraining and pretraining.dataset.examples)
    comm.check_same_everywhere(contents)
    planned = planned_peak_gib(config)
    rlhf_engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=config.models["actor"],
        critic_model_name_or_path=config.models["critic"],
        tokenizer=tokenizer,
        num_total_iters=num_iterations,
        args=config,
    )
    print_banner(ppo_banner(config, rlhf_engine, num_iterations))
    given = dict(on_phase=this_run.tell, held_out=held_out, planned_gib=planned)
    trainer = DeepSpeedPPOTrainer(rlhf_engine, config, pretraining, **given)
    kept = dict(contents=contents, stop=this_run.stop, on_phase=this_run.tell)
    checkpoints = Checkpoints(config, rlhf_engine.trained, **kept)
    new_tracker = partial(Tracker, config, num_iterations=num_iterations, is_main=comm.is_main())
    tracker = checkpoints.go_on(trainer, num_iterations, new_tracker)
    this_run.listeners.append(tracker.phase)
    with tracker:
        if trainer.train(prompts, num_iterations, tracker, checkpoints):
            export(rlhf_engine, config)


def export(rlhf_engine: DeepSpeedRLHFEngine, config: PPOConfig) -> None:
    """Write the trained models, and remove those of an earlier run that this one does not have."""
    output_dir = Path(config.output_dir)
    written = rlhf_engine.export(output_dir)
    for name in {"actor", "actor_ema", "critic"} - set(written) if comm.is_main() else ():
        shutil.rmtree(output_dir / name, ignore_errors=True)


if __name__ == "__main__":
    run(main)
