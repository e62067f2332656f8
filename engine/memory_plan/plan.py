"""The memory plan of a PPO run: a config and a number of ranks -> bytes by role and phase."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.config import PPOConfig, resolved_dtype
from engine.distributed.zero_config import frozen_config, sharding_of, training_config
from engine.memory_plan.model_states import ModelStates, model_states
from engine.memory_plan.phases import Phase, Sizes, phases
from engine.memory_plan.roles import Role, roles_of


@dataclass(frozen=True)
class Plan:
    """What one rank holds, at the most.

    Attributes:
        device: what the models are on.
        dtype: of weights and what is computed with them.
        sizes: of the passes it counts.
        roles: those that are models of their own.
        sharding: the file that describes each role's.
        phases: load, generate, score, train.
        host_bytes: on one machine, of all its ranks: what is offloaded, and the weights on their way to the devices.
    """

    world_size: int
    device: Literal["cuda", "cpu"]
    dtype: str
    sizes: Sizes
    roles: dict[str, ModelStates]
    sharding: dict[str, Path]
    phases: dict[str, Phase]
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Of all phases, on the device."""
        return max(phase.peak_bytes for phase in self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """As `memory_plan.json` holds it: bytes of one rank on its device."""
        shown = ("zero_stage", "parameters", "weights_bytes", "gradients_bytes", "optimizer_bytes", "host_bytes")
        roles = {role: {name: getattr(of, name) for name in shown} for role, of in self.roles.items()}
        actor = self.roles["actor"]
        if actor.average_bytes:
            of_average = dict(zero_stage=actor.zero_stage, parameters=actor.trained_parameters)
            nothing = dict.fromkeys(("gradients_bytes", "optimizer_bytes", "host_bytes"), 0)
            roles["actor_ema"] = of_average | {"weights_bytes": actor.average_bytes} | nothing
        return {
            "world_size": self.world_size,
            "device": self.device,
            "dtype": self.dtype,
            "sizes": asdict(self.sizes),
            "roles": roles,
            "phases": {name: {"peak_bytes": of.peak_bytes, "parts": of.parts} for name, of in self.phases.items()},
            "peak_bytes": self.peak_bytes,
            "host_bytes": self.host_bytes,
        }


@dataclass(frozen=True)
class Planner:
    """A run's models, measured once, for plans under any sharding, number of ranks and sizes of batches."""

    config: PPOConfig
    device: Literal["cuda", "cpu"]
    dtype: str
    roles: tuple[Role, ...]

    @classmethod
    def of(cls, config: PPOConfig, *, device: Literal["cuda", "cpu"]) -> "Planner":
        dtype = resolved_dtype(config.dtype, on_gpu=device == "cuda")
        return cls(config, device, dtype, roles_of(config, dtype=getattr(torch, dtype)))

    def states(self, role: Role, sharding: Path, *, world_size: int) -> ModelStates:
        """Of a role, sharded as a file of `ds_configs/` says."""
        zero = training_config(sharding, dtype=self.dtype, max_grad_norm=0) if role.trained else None
        given = dict(world_size=world_size, device=self.device)
        return model_states(role, sharding_of(zero or frozen_config(sharding, dtype=self.dtype)), **given)

    def plan(
        self, sharding: Mapping[str, Path], *, world_size: int, ranks_per_node: int, sizes: Sizes | None = None
    ) -> Plan:
        """
        Args:
            sharding: each role's file.
            sizes: of the config when not given.
        """
        states = {role.name: self.states(role, sharding[role.name], world_size=world_size) for role in self.roles}
        return self.plan_of(states, sharding, world_size=world_size, ranks_per_node=ranks_per_node, sizes=sizes)

    def plan_of(
        self,
        states: dict[str, ModelStates],
        sharding: Mapping[str, Path],
        *,
        world_size: int,
        ranks_per_node: int,
        sizes: Sizes | None = None,
    ) -> Plan:
        """`plan`, of states that are known."""
        sizes = sizes or Sizes.of(self.config, world_size=world_size)
        here = min(ranks_per_node, world_size)
        found = phases(self.config, self.roles, states, sizes)
        # A model that is not sharded as it is made is read into the host's memory by every rank, and moved from there.
        loaded = [of.whole_bytes * (1 if of.zero_stage == 3 else here) for of in states.values()]
        host = max(loaded) + here * sum(of.host_bytes for of in states.values())
        return Plan(world_size, self.device, self.dtype, sizes, states, dict(sharding), found, host)


def memory_plan(
    config: PPOConfig, world_size: int, *, device: Literal["cuda", "cpu"] = "cuda", ranks_per_node: int = 8
) -> Plan:
    """What a run takes on each rank, from its config alone: no weights are read.

    Raises:
        ValueError: a model's sizes are not known.
    """
    planner = Planner.of(config, device=device)
    sharding = {role.name: config.ds_config_of(role.name) for role in planner.roles}
    return planner.plan(sharding, world_size=world_size, ranks_per_node=ranks_per_node)
