"""Times PPO iterations by phase against what the machine could do, and against TRL.

    python tests/benchmarks/bench_ppo.py --ranks 2 --peer trl

Each side runs as processes of its own and, with a peer, in turns (ours, peer, ours, peer), so that noise on the machine
hits both. Prints one table per workload; --output writes every number behind it. README.md says what the numbers mean.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from operations import phase_operations
from workload import Workload, write_models

HERE = Path(__file__).resolve().parent
PHASES = ("generate", "score", "train")
# One run of one side holds these per timed iteration.
PER_ITERATION = ("seconds_per_iteration", "cpu_seconds_per_iteration", "prompt_lengths", "response_lengths")


def run(side: str, folder: Path, ranks: int, *, iterations: int, flags: list[str]) -> dict:
    """One side's JSON object, from `ranks` processes of its own, with the machine's load before and after."""
    out = folder / f"{side}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(HERE / f"{side}_ppo.py"), "--workload", str(folder), "--out", str(out)]
    command += ["--warmup", "1", "--iterations", str(1 + iterations), *flags]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, os.cpu_count() // ranks)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text()) | {"load": [load, os.getloadavg()[0]]}


def together(runs: list[dict]) -> dict:
    """Several runs of one side as one: all their iterations, the highest peak of each rank."""
    return {
        **runs[0],
        **{name: [value for part in runs for value in part[name]] for name in PER_ITERATION},
        "phases": {name: [v for part in runs for v in part["phases"][name]] for name in runs[0]["phases"]},
        "peak_rss_gib": [max(peaks) for peaks in zip(*(part["peak_rss_gib"] for part in runs), strict=True)],
        "load": [part["load"] for part in runs],
    }


def summary(side: dict, workload: Workload, gflops: float) -> dict[str, float]:
    """The table's column of one side: medians over iterations, and times over (operations / rate)."""
    lengths = list(zip(side["prompt_lengths"], side["response_lengths"], strict=True))
    counts = [phase_operations(workload, *one) for one in lengths]
    least = {phase: statistics.fmean(count[phase] for count in counts) / gflops / 1e9 for phase in PHASES}
    phases = {phase: statistics.median(seconds) for phase, seconds in side["phases"].items()}
    seconds = statistics.median(side["seconds_per_iteration"])
    cpu_seconds = statistics.median(side["cpu_seconds_per_iteration"])
    rates = [sum(r) / s for (_, r), s in zip(lengths, side["seconds_per_iteration"], strict=True)]
    return {
        "seconds_per_iteration": seconds,
        **{f"  {phase}": value for phase, value in phases.items()},
        "cpu_seconds_per_iteration": cpu_seconds,
        "response_tokens": statistics.fmean(sum(r) for _, r in lengths),
        "response_tokens_per_s": statistics.median(rates),
        "peak_gib_per_rank": max(side["peak_rss_gib"]),
        "floor_ratio": seconds / sum(least.values()),
        **{f"  floor_ratio {phase}": phases[phase] / least[phase] for phase in PHASES},
        "floor_ratio of CPU seconds": cpu_seconds / sum(least.values()),
    }


def compared(workload: Workload, args: argparse.Namespace) -> dict:
    """All runs of one workload, in turns, and what they come to."""
    micro_batch_sizes = {"engine": args.micro_batch_size, "trl": args.peer_micro_batch_size}
    sides = ["engine"] + ([args.peer] if args.peer else [])
    turns = min(2, args.iterations) if args.peer else 1
    shares = [args.iterations // turns + (turn < args.iterations % turns) for turn in range(turns)]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_models(folder, workload)
        for turn, iterations in enumerate(shares):
            for side in sides:
                flags = ["--micro_batch_size", str(micro_batch_sizes[side]), "--seed", str(args.seed + turn)]
                flags += ["--zero_stage", str(args.zero_stage)] if side == "engine" else []
                runs[side].append(run(side, Path(folder), args.ranks, iterations=iterations, flags=flags))
                seconds = " ".join(f"{value:.1f}" for value in runs[side][-1]["seconds_per_iteration"])
                print(f"{workload.name} {side}: {seconds} s  load {os.getloadavg()[0]:.1f}", flush=True)
    gflops = max(part["matmul_gflops"] for part in runs["engine"])
    result = {side: together(parts) for side, parts in runs.items()}
    columns = {side: summary(whole, workload, gflops) for side, whole in result.items()}
    if args.peer:
        ours, peer = columns["engine"], columns[args.peer]
        columns[f"{args.peer} / engine"] = {name: peer[name] / ours[name] for name in ours}
    return {"matmul_gflops": gflops, "summary": columns, **result}


def table(workload: Workload, result: dict) -> str:
    """The summary, one line per number and one column per side."""
    columns = result["summary"]
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [
        f"\nworkload {workload.name}: {workload.num_prompts} responses, {workload.world_size} ranks, "
        f"ZeRO {result['engine']['zero_stage']}, {result['matmul_gflops']:.0f} GFLOP/s on all ranks",
        " " * 28 + "".join(f"{name:>14}" for name in columns),
    ]
    for name in names:
        cells = (f"{column[name]:14.2f}" if name in column else " " * 13 + "-" for column in columns.values())
        lines.append(f"{name:28}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workload", choices=("fixed", "eos", "both"), default="both")
    parser.add_argument("--peer", choices=("trl",), help="also run this one, in turns; needs the extra `bench`")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of each side, over all turns")
    parser.add_argument("--zero_stage", type=int, default=0, help="of our four models")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--peer_micro_batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; each turn has the next one")
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()
    if args.iterations < 1:
        raise ValueError(f"--iterations {args.iterations} must be at least 1")
    workloads = [Workload.named(w).on(args.ranks) for w in ("fixed", "eos") if args.workload in (w, "both")]

    report = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load_at_start": os.getloadavg(),
        "workloads": {},
    }
    for workload in workloads:
        result = report["workloads"][workload.name] = compared(workload, args)
        print(table(workload, result), flush=True)
    report["load_at_end"] = os.getloadavg()
    sides = [side for side in report["workloads"][workloads[0].name].values() if isinstance(side, dict)]
    report["versions"] = {name: v for side in sides for name, v in side.get("versions", {}).items()}
    loads = [" ".join(f"{load:.1f}" for load in report[f"load_at_{when}"]) for when in ("start", "end")]
    print(
        f"\nversions {report['versions']}\nload {loads[0]} at the start, {loads[1]} at the end, {os.cpu_count()} cores"
    )
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
