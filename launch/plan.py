"""Say how much memory a PPO run takes on each rank, and how to shard it so that it fits, from its config alone.

    python launch/plan.py --config launch/recipes/llama_8b_ppo.yaml --world_size 8 --device_memory 80GiB

No weights are read, no GPU is needed and nothing is written. Any setting of the run may be given besides, as
`--micro_batch_size 2`. The exit code is 1 where nothing fits.
"""

import argparse
import re
import sys

import engine.startup  # noqa: F401 - first
from engine.config import PPOConfig, parse, run
from engine.memory_plan import Machine, Planner, as_table, memory_plan, recommendation
from engine.memory_plan.recommendation import MARGIN

UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}


def main() -> None:
    asked, others = arguments()
    config = parse(PPOConfig, [*others, "--output_dir", "nothing is written"])
    machine = Machine(
        world_size=asked.world_size,
        device_memory=in_bytes(asked.device_memory),
        host_memory=None if asked.host_memory is None else in_bytes(asked.host_memory),
        ranks_per_node=asked.ranks_per_node,
    )
    if config.dtype == "auto":
        print("dtype=auto is bfloat16, as on a GPU. A run on a CPU is of float32: --dtype float32.\n")
    if config.zero_stage != "auto":
        plan = memory_plan(config, asked.world_size, ranks_per_node=asked.ranks_per_node)
        print(f"As the config says:\n\n{as_table(plan)}")
        lacking = " nor into ".join(machine.too_small_for(plan))
        print(f"This DOES NOT FIT into {lacking}.\n" if lacking else f"This fits, with {MARGIN:.0%} left free.\n")
    found = recommendation(Planner.of(config, device="cuda"), machine)
    if found.plan is not None:
        print(f"Recommended:\n\n{as_table(found.plan)}\n")
    print("\n".join(f"- {reason}" for reason in found.reasons))
    if found.plan is None:
        sys.exit(1)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Those of the machine, and the run's."""
    others = "The run's settings, --config among them, are those that launch/train_ppo.py --help lists."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=others, allow_abbrev=False)
    parser.add_argument("--world_size", type=int, required=True, help="ranks of the run, each with a device")
    parser.add_argument("--device_memory", required=True, help="of each device, as 80GiB")
    parser.add_argument("--host_memory", help="of each machine, as 1000GiB; not looked at when not given")
    parser.add_argument("--ranks_per_node", type=int, default=8, help="ranks that share a machine (default: 8)")
    return parser.parse_known_args()


def in_bytes(size: str) -> int:
    """`80GiB` -> bytes.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", size.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{size} is no size: write 80GiB, 80GB or 512MiB.")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    run(main)
