"""The defaults of the literature and of other engines, by the names of our settings: `--preset NAME`.

A preset is what a run has before its recipe and its flags. What a source says nothing about stays ours, and so does
what this engine does in one way only: masks from lengths, whitening and means over the tokens of all ranks.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The demo of early PPO for language models: one model of 4 bits for all roles. Its LoRA has a dropout of 0.05,
    # which PPO refuses (SteadyLoRAConfig). Learning rates and whitening: ours.
    "literature": {
        "shared_trunk": True,  # actor and critic on one adapter, the ref without it
        "value_coef": 0.1,
        "kl_coef": 0.2,  # where an adaptive coefficient begins
        "kl_controller": "ziegler",  # Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2
        "kl_target": 6.0,
        "kl_horizon": 10_000,
        "kl_estimator": "full",
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "ppo_epochs": 3,
        "rollout_batch_size": 2,
        "minibatch_size": 1,
        "micro_batch_size": 1,  # all that a minibatch of 1 allows
        "rollout.temperature": 1.0,  # pure sampling
        "rollout.top_p": 1.0,
        "rollout.top_k": 0,
        "rollout.max_response_tokens": 32,
        "actor.lora": {
            "r": 8,
            "alpha": 16.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
        "actor.quantization": "nf4",  # with double quantisation, as always here
    },
    # Yao et al. 2023, https://arxiv.org/abs/2308.01320. Its loss means are per micro-batch, its masks from the pad id.
    "deepspeed-chat": {
        "kl_coef": 0.1,
        "kl_controller": "fixed",
        "kl_estimator": "k1",
        "reward.clip": 5.0,
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "advantage_whitening": "none",
        "ppo_epochs": 1,
        "actor.learning_rate": 9.65e-6,
        "critic.learning_rate": 5e-6,
        "loss_mean": "tokens",
    },
    # https://github.com/huggingface/trl, PPOTrainer. It whitens on each rank, its loss means are per micro-batch, its
    # masks from the pad id.
    "trl": {
        "kl_coef": 0.05,
        "kl_controller": "fixed",
        "kl_estimator": "k1",
        "reward.clip": None,
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "advantage_whitening": "global",
        "ppo_epochs": 4,
        "actor.learning_rate": 3e-6,  # one optimizer for both
        "critic.learning_rate": 3e-6,
        "loss_mean": "tokens",
    },
    # Hu et al. 2024, https://arxiv.org/abs/2405.11143.
    "openrlhf": {
        "kl_coef": 0.01,
        "kl_controller": "fixed",
        "kl_estimator": "k1",
        "reward.clip": 10.0,
        "gamma": 1.0,
        "lam": 1.0,
        "clip_range": 0.2,
        "value_clip_range": 0.5,
        "advantage_whitening": "global",
        "ppo_epochs": 1,
        "actor.learning_rate": 1e-6,
        "critic.learning_rate": 9e-6,
        "loss_mean": "tokens",
    },
}
