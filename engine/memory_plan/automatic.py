"""The memory plan of a run that starts: asked for stages where they are left to it, and written to the run's folder."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engine.config import PPOConfig
from engine.distributed import comm
from engine.memory_plan.model_shapes import fetch_config
from engine.memory_plan.phases import Sizes
from engine.memory_plan.plan import Plan, Planner, memory_plan
from engine.memory_plan.recommendation import Machine, recommendation

FILE = "memory_plan.json"


def with_stages_chosen(config: PPOConfig) -> PPOConfig:
    """The config with `zero_stage: auto` spelled out for each role, the same on every rank; any other as it is.

    A collective where there is something to choose: rank 0 decides, by the least memory that is free on any rank and
    its machine.

    Raises:
        ValueError: on every rank, when nothing fits, or a model's sizes are not known.
    """
    if config.zero_stage != "auto":
        return config
    machine = Machine(
        world_size=comm.world_size(),
        device_memory=int(-comm.max_over_ranks(-comm.free_memory())),
        host_memory=int(-comm.max_over_ranks(-comm.free_host_memory())),
        ranks_per_node=int(comm.max_over_ranks(comm.ranks_on_node())),
    )
    chosen: dict[str, Any] = {}
    with comm.same_error_everywhere():
        for name in config.models.values():
            fetch_config(name)
    with comm.same_error_everywhere():
        if comm.is_main():
            chosen = _settings(config, machine, device=comm.device().type)
    groups = {name: replace(getattr(config, name), **how) for name, how in comm.of_main(chosen).items()}
    return replace(config, zero_stage=None, **groups)


def _settings(config: PPOConfig, machine: Machine, *, device: Literal["cuda", "cpu"]) -> dict[str, dict[str, Any]]:
    """What to set in each group of the config; prints why."""
    own = {role: getattr(config, role) for role in ("actor", "critic", "ref", "reward")}
    named = [role for role, of in own.items() if (of.zero_stage, of.ds_config) != (None, None)]
    fixed = {role: config.ds_config_of(role) for role in named}
    found = recommendation(Planner.of(config, device=device), machine, fixed=fixed, sizes_stay=True)
    said = "\n  ".join(("", *found.reasons))
    if found.sizes != Sizes.of(config, world_size=machine.world_size):  # none, or others, which are the user's to set
        raise ValueError(f"zero_stage=auto finds no way for this run as it is set:{said}")
    print(f"zero_stage=auto:{said}", flush=True)
    roles = {role: _setting(file) for role, file in found.sharding.items() if role not in fixed}
    return roles | {"rollout": {"weights": found.rollout_weights}}


def _setting(file: Path) -> dict[str, int | str]:
    plain = re.fullmatch(r"zero(\d)", file.stem)
    return {"zero_stage": int(plain[1])} if plain else {"ds_config": str(file)}


def planned_peak_gib(config: PPOConfig) -> float | None:
    """What a run that starts is planned to take on each rank, on every rank; None, and a line that says why, where
    there is no plan. Rank 0 writes the plan to the run's folder. A collective.
    """
    plan = None
    if comm.is_main():
        try:
            path = Path(config.output_dir) / FILE
            path.unlink(missing_ok=True)  # another run's
            given = dict(device=comm.device().type, ranks_per_node=comm.ranks_on_node())
            plan = memory_plan(config, comm.world_size(), **given)
            _write(plan, path)
        except Exception as error:  # of whatever kind: a run does not end for want of a plan, and the others wait here
            print(f"No memory plan: {type(error).__name__}: {error}", flush=True)
    return comm.of_main(plan and plan.peak_bytes / 2**30)


def _write(plan: Plan, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plan.as_dict(), indent=2) + "\n")
    partial.replace(path)
