"""Times PPO iterations by phase against what the machine could do, and against TRL.

    python tests/benchmarks/bench_ppo.py --ranks 2 --peer trl

Each side runs as processes of its own, one side after the other and, with a peer, in turns (ours, peer, ours, peer), so
that noise on the machine hits both. Prints one table per workload and writes all numbers to --output.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from operations import phase_operations
from workload import Workload, write_models

HERE = Path(__file__).resolve().parent
PHASES = ("generate", "score", "train")


def run(side: str, folder: Path, ranks: int, iterations: int, flags: list[str]) -> dict:
    """One side's JSON object, from `ranks` processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"{side}.json"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    command += [str(HERE / f"{side}_ppo.py"), "--workload", str(folder), "--out", str(out)]
    command += ["--iterations", str(iterations + 1), *flags]
    threads = str(max(1, os.cpu_count() // ranks))
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def together(parts: list[dict]) -> dict:
    """Several runs of one side as one: medians over all their iterations."""
    seconds = [value for part in parts for value in part["seconds_per_iteration"]]
    tokens = [value for part in parts for value in part["response_tokens"]]
    return {
        **parts[0],
        "seconds_per_iteration": seconds,
        "median_seconds_per_iteration": statistics.median(seconds),
        "response_tokens": tokens,
        "response_tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "phases": {name: [v for part in parts for v in part["phases"][name]] for name in parts[0]["phases"]},
        "peak_rss_gib": [max(ranks) for ranks in zip(*(part["peak_rss_gib"] for part in parts), strict=True)],
        **{
            name: [v for part in parts for v in part[name]]
            for name in ("prompt_lengths", "response_lengths")
            if name in parts[0]
        },
    }


def floors(workload: Workload, ours: dict) -> dict[str, float]:
    """Measured time over (operations / matrix rate), by phase and in all: 1.0 is the machine's limit."""
    counted = [
        phase_operations(workload, prompts, responses)
        for prompts, responses in zip(ours["prompt_lengths"], ours["response_lengths"], strict=True)
    ]
    rate = ours["matmul_gflops"] * 1e9
    least = {phase: statistics.fmean(row[phase] for row in counted) / rate for phase in PHASES}
    ratios = {phase: statistics.median(ours["phases"][phase]) / least[phase] for phase in PHASES}
    return ratios | {"iteration": ours["median_seconds_per_iteration"] / sum(least.values())}


def table(workload: Workload, ours: dict, peer: dict | None) -> str:
    lines = [f"\nworkload {workload.name}: {workload.num_prompts} responses, ZeRO {ours['zero_stage']}"]
    sides = [("engine", ours)] + ([("trl", peer)] if peer is not None else [])
    for name, side in sides:
        phases = "  ".join(f"{p} {statistics.median(v):.2f}" for p, v in side["phases"].items())
        lines += [
            f"  {name:7} seconds_per_iteration {side['median_seconds_per_iteration']:.2f}  ({phases})",
            f"          response_tokens_per_s {side['response_tokens_per_second']:.0f}  "
            f"peak GiB per rank {' '.join(f'{gib:.2f}' for gib in side['peak_rss_gib'])}",
        ]
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ours["floor_ratio"].items())
    lines.append(f"  floor_ratio at {ours['matmul_gflops']:.0f} GFLOP/s on all ranks: {ratios}")
    if peer is not None:
        ratio = peer["median_seconds_per_iteration"] / ours["median_seconds_per_iteration"]
        lines.append(f"  trl / engine: {ratio:.2f}x the time")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workload", choices=("fixed", "eos", "both"), default="both")
    parser.add_argument("--peer", choices=("trl",), help="also run this one, in turns; needs the extra `bench`")
    parser.add_argument("--iterations", type=int, default=6, help="timed iterations of each side")
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()

    print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} cores", flush=True)
    results = []
    for name in ("fixed", "eos") if args.workload == "both" else (args.workload,):
        total = Workload.named(name).num_prompts
        workload = replace(Workload.named(name), world_size=args.ranks, prompts_per_rank=total // args.ranks)
        with tempfile.TemporaryDirectory() as folder:
            write_models(folder, workload)
            turns = 2 if args.peer else 1
            flags = ["--zero_stage", str(args.zero_stage), "--micro_batch_size", str(args.micro_batch_size)]
            ours, peers = [], []
            for _ in range(turns):
                ours.append(run("engine", Path(folder), args.ranks, -(-args.iterations // turns), flags))
                if args.peer:
                    peers.append(run("trl", Path(folder), args.ranks, -(-args.iterations // turns), []))
        engine = together(ours)
        engine["matmul_gflops"] = max(part["matmul_gflops"] for part in ours)
        engine["floor_ratio"] = floors(workload, engine)
        peer = together(peers) if peers else None
        print(table(workload, engine, peer), flush=True)
        results.append({"engine": engine, "trl": peer})
    versions = results[0]["engine"]["versions"] | (results[0]["trl"]["versions"] if args.peer else {})
    print(f"\nversions {versions}\nload {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
