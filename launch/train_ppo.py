"""Train an actor and a critic by PPO against a frozen ref and a frozen source of scores.

    deepspeed --num_accelerators 2 launch/train_ppo.py --config launch/recipes/gsm8k_tiny.yaml --output_dir runs/ppo

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl, samples.jsonl and the
exported actor/ and critic/ to the output folder. Leaves out: resuming (a run that ends early starts again).
"""

import shutil
from pathlib import Path

from engine.config import PPOConfig, parse, run
from engine.data import create_datasets, create_pretraining_dataset
from engine.distributed import comm
from engine.distributed.checkpoint import export_critic_of_trunk, export_huggingface
from engine.models.loading import load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.environments import load_environment
from engine.rollout.score_functions import load_score_function
from engine.tracking import Tracker
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer


def main() -> None:
    config = parse(PPOConfig)
    comm.start(config)

    output_dir, actor_name = Path(config.output_dir), config.model_of("actor")
    with comm.same_error_everywhere():
        if config.reward.function is not None:
            load_score_function(config.reward.function)  # a wrong name is told before models are built
        if config.rollout.environment is not None:
            load_environment(config.rollout.environment)
        tokenizer = load_tokenizer(actor_name, chat_template=config.data.chat_template)
        prompts, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=3)
        pretraining = create_pretraining_dataset(config, tokenizer)
    if pretraining is not None:
        comm.check_same_everywhere({"the demonstrations": pretraining.dataset.examples.digest})
    comm.check_same_everywhere({"the prompts": prompts.dataset.digest})
    rlhf_engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=actor_name,
        critic_model_name_or_path=config.model_of("critic"),
        tokenizer=tokenizer,
        num_total_iters=num_iterations,
        args=config,
    )
    if comm.is_main():
        sizes = ", ".join(f"{role} {size / 2**20:.1f}" for role, size in rlhf_engine.parameter_bytes().items())
        print(f"Weights in memory, MiB: {sizes}", flush=True)
        for name, why in config.without_effect.items():
            print(f"Note: {name} has no effect in this run: {why}.", flush=True)
    trainer = DeepSpeedPPOTrainer(rlhf_engine, config, pretraining)
    with comm.same_error_everywhere():
        tracker = Tracker(config, num_iterations=num_iterations, is_main=comm.is_main())
    with tracker:
        trainer.train(prompts, num_iterations, tracker)
        actor, critic, average = rlhf_engine.actor, rlhf_engine.critic, rlhf_engine.actor_ema
        form = config.actor.export_form
        export_huggingface(actor, output_dir / "actor", tokenizer, form=form)
        if average is not None:
            export_huggingface(actor, output_dir / "actor_ema", tokenizer, form=form, average=average)
        if critic is not None:
            export_huggingface(critic, output_dir / "critic", tokenizer, form=config.critic.export_form)
        elif actor.module.has_value_head:
            export_critic_of_trunk(actor, output_dir / "critic", tokenizer)
    written = {"actor": True, "actor_ema": average is not None, "critic": config.has_critic}
    if comm.is_main():
        for name in (name for name, is_new in written.items() if not is_new):
            shutil.rmtree(output_dir / name, ignore_errors=True)  # of an earlier run into this folder
        exported = ", ".join(name for name, is_new in written.items() if is_new)
        print(f"Done: {num_iterations} iterations. Metrics, samples, {exported}: {output_dir}")
    comm.shutdown()


if __name__ == "__main__":
    run(main)
