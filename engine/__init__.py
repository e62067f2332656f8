"""A distributed RLHF engine: actor, ref, critic and reward model under ZeRO sharding, trained by PPO;
SFT, reward models and DPO around it.

The public names are imported on first use, so that `import engine` stays cheap and never pulls in deepspeed.
"""

import logging
from importlib import import_module

_HOMES = {
    "DPOConfig": "engine.config",
    "PPOConfig": "engine.config",
    "RewardModelConfig": "engine.config",
    "SFTConfig": "engine.config",
    "create_datasets": "engine.data",
    "DeepSpeedRLHFEngine": "engine.rlhf_engine",
    "DeepSpeedPPOTrainer": "engine.trainers.ppo_trainer",
    "SupervisedTrainer": "engine.trainers.supervised_trainer",
}
__all__ = sorted(_HOMES)

# bitsandbytes 0.50 warns, whenever it is imported, of a faster kernel that is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}. Public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
