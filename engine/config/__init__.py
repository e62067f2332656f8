"""Every knob of a run: frozen dataclasses, checked when built. What can be derived is a property, not a field.

`parse` reads a preset, a YAML recipe and dotted command-line overrides (`--actor.zero_stage 3`); a name that does not
exist is refused. How memory is sharded is not here but in `ds_configs/`.
"""

from engine.config.checkpoint import CheckpointConfig, settings_that_stay
from engine.config.checks import DS_CONFIGS
from engine.config.command_line import as_dict, parse, run
from engine.config.data import DataConfig, DemonstrationDataConfig, PreferenceDataConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.guards import KLGuardConfig
from engine.config.ppo import PPOConfig
from engine.config.roles import (
    CriticConfig,
    FrozenRoleConfig,
    LoRAConfig,
    OptimizerConfig,
    RewardConfig,
    SteadyLoRAConfig,
    TrainedRoleConfig,
    resolved_dtype,
)
from engine.config.rollout import PretrainingConfig, RolloutConfig
from engine.config.supervised import DPOConfig, RewardModelConfig, SFTConfig, SupervisedConfig
from engine.config.tracking import TrackingConfig

__all__ = [
    "DS_CONFIGS",
    "CheckpointConfig",
    "CriticConfig",
    "DPOConfig",
    "DataConfig",
    "DemonstrationDataConfig",
    "EvaluationConfig",
    "FrozenRoleConfig",
    "KLGuardConfig",
    "LoRAConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PreferenceDataConfig",
    "PretrainingConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "SFTConfig",
    "SteadyLoRAConfig",
    "SupervisedConfig",
    "TrackingConfig",
    "TrainedRoleConfig",
    "as_dict",
    "parse",
    "resolved_dtype",
    "run",
    "settings_that_stay",
]
