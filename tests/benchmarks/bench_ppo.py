"""Times PPO iterations by phase against TRL, against what the machine could do, and against themselves.

    python tests/benchmarks/bench_ppo.py                      # every row of the table
    python tests/benchmarks/bench_ppo.py fixed eos --without_peer

Every case runs as processes of its own, all cases in turns (fixed, its peer, eos, ..., and again), so that noise on the
machine hits them all. Prints a table of the cases and one of the targets; --output writes every number behind them.
README.md says what the numbers mean.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from operations import phase_operations
from workload import Workload, write_models

HERE = Path(__file__).resolve().parent
PHASES = ("generate", "score", "train")
WARMUP = 2  # the optimizer's states are made in the first iteration, and in the second the heap settles around them
# One run of one case holds these per timed iteration.
PER_ITERATION = ("seconds_per_iteration", "cpu_seconds_per_iteration", "prompt_lengths", "response_lengths")


@dataclass(frozen=True)
class Case:
    """What one run does; all of one size have the same prompts, models of the same sizes and one thread a rank."""

    name: str
    side: Literal["engine", "trl"] = "engine"
    responses: Literal["fixed", "eos"] = "fixed"
    architecture: str = "llama"
    size: Literal["small", "0.5B"] = "small"
    ranks: int = 2
    flags: tuple[str, ...] = ()

    @property
    def workload(self) -> Workload:
        return Workload.named(self.responses, self.architecture, self.size).on(self.ranks)

    @property
    def is_for_a_gpu(self) -> bool:
        return self.size != "small"


CASES = {
    case.name: case
    for case in (
        Case("fixed"),
        Case("fixed, TRL", side="trl"),
        Case("eos", responses="eos"),
        Case("eos, TRL", side="trl", responses="eos"),
        Case("zero3", flags=("--zero_stage", "3")),
        Case("trunk", flags=("--shared_trunk",)),
        Case("one rank", ranks=1),
        Case("gqa", architecture="gqa"),
        Case("gqa, TRL", side="trl", architecture="gqa"),
        Case("gpt2", architecture="gpt2"),
        Case("gpt2, TRL", side="trl", architecture="gpt2"),
        Case("0.5B", architecture="gqa", size="0.5B", ranks=1, flags=("--dtype", "bfloat16")),
    )
}

Columns = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Target:
    """One row of the table of targets."""

    what: str
    value: Callable[[Columns], float]
    bound: Literal["at least", "at most"]
    target: float

    def met(self, value: float) -> bool:
        return value >= self.target if self.bound == "at least" else value <= self.target


def ratio(over: str, under: str, name: str = "seconds_per_iteration") -> Callable[[Columns], float]:
    return lambda columns: columns[over][name] / columns[under][name]


def ahead_of_llama(architecture: str) -> Callable[[Columns], float]:
    """How far ahead of TRL, over how far with Llama."""
    theirs, ours = ratio(f"{architecture}, TRL", architecture), ratio("fixed, TRL", "fixed")
    return lambda columns: theirs(columns) / ours(columns)


TARGETS = [
    Target("fixed 64 new tokens, TRL / engine", ratio("fixed, TRL", "fixed"), "at least", 2.0),
    # By tokens: the sides draw other responses, of other lengths.
    Target(
        "24 new tokens on average, engine / TRL", ratio("eos", "eos, TRL", "response_tokens_per_s"), "at least", 3.5
    ),
    Target("ZeRO 3 / ZeRO 0", ratio("zero3", "fixed"), "at most", 1.5),
    Target("ZeRO 3 / ZeRO 0, generate", ratio("zero3", "fixed", "generate"), "at most", 1.1),
    Target("shared trunk / four models", ratio("trunk", "fixed"), "at most", 0.55),
    *(
        Target(f"floor_ratio, {phase}, {case}", lambda c, n=f"floor_ratio {phase}", k=case: c[k][n], "at most", most)
        for case in ("fixed", "eos")
        for phase, most in (("generate", 2.5), ("score", 1.5), ("train", 1.5))
    ),
    Target("1 rank / 2 ranks", ratio("one rank", "fixed"), "at least", 1.8),
    Target("peak memory of a rank, engine / TRL", ratio("fixed", "fixed, TRL", "peak_gib_per_rank"), "at most", 0.7),
    *(
        Target(f"{architecture} / llama, of TRL / engine", ahead_of_llama(architecture), bound, limit)
        for architecture in ("gqa", "gpt2")
        for bound, limit in (("at least", 0.8), ("at most", 1.2))
    ),
]


def run(case: Case, folder: Path, *, iterations: int, micro_batch_size: int, seed: int) -> dict:
    """One case's JSON object, from processes of its own, with the machine's load before and after."""
    out = folder / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    command += [str(HERE / f"{case.side}_ppo.py"), "--workload", str(folder), "--out", str(out)]
    command += ["--warmup", str(WARMUP), "--iterations", str(WARMUP + iterations), "--seed", str(seed)]
    command += ["--micro_batch_size", str(micro_batch_size), *case.flags]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
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
    """Several runs of one case as one: all their iterations, the highest peak of each rank."""
    return {
        **runs[0],
        **{name: [value for part in runs for value in part[name]] for name in PER_ITERATION},
        "phases": {name: [v for part in runs for v in part["phases"][name]] for name in runs[0]["phases"]},
        "peak_rss_gib": [max(peaks) for peaks in zip(*(part["peak_rss_gib"] for part in runs), strict=True)],
        **{name: [part[name] for part in runs] for name in ("load", "matmul_gflops") if name in runs[0]},
    }


def summary(whole: dict, case: Case, gflops: float) -> dict[str, float]:
    """The table's column of one case: medians over iterations, and times over (operations / rate).

    Args:
        gflops: of all its ranks together.
    """
    lengths = list(zip(whole["prompt_lengths"], whole["response_lengths"], strict=True))
    phases = {phase: statistics.median(seconds) for phase, seconds in whole["phases"].items() if phase in PHASES}
    seconds = statistics.median(whole["seconds_per_iteration"])
    rates = [sum(r) / s for (_, r), s in zip(lengths, whole["seconds_per_iteration"], strict=True)]
    column = {
        "GFLOP/s of large products": gflops,
        "seconds_per_iteration": seconds,
        **phases,
        "cpu_seconds_per_iteration": statistics.median(whole["cpu_seconds_per_iteration"]),
        "response_tokens": statistics.fmean(sum(r) for _, r in lengths),
        "response_tokens_per_s": statistics.median(rates),
        "peak_gib_per_rank": max(whole["peak_rss_gib"]),
    }
    if case.flags == ("--shared_trunk",):
        return column  # fewer operations, which nobody has counted
    counts = [phase_operations(case.workload, *one) for one in lengths]
    least = {phase: statistics.fmean(count[phase] for count in counts) / gflops / 1e9 for phase in PHASES}
    return {
        **column,
        "floor_ratio": seconds / sum(least.values()),
        **{f"floor_ratio {phase}": phases[phase] / least[phase] for phase in PHASES},
    }


def measured(cases: list[Case], args: argparse.Namespace) -> dict:
    """All runs, in turns, and what they come to."""
    turns = min(2, args.iterations)
    shares = [args.iterations // turns + (turn < args.iterations % turns) for turn in range(turns)]
    runs: dict[str, list[dict]] = {case.name: [] for case in cases}
    sizes = {"engine": args.micro_batch_size, "trl": args.peer_micro_batch_size}
    for turn, iterations in enumerate(shares):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                write_models(folder, case.workload)
                given = dict(micro_batch_size=sizes[case.side], seed=args.seed + turn)
                runs[case.name].append(run(case, Path(folder), iterations=iterations, **given))
            seconds = " ".join(f"{value:.1f}" for value in runs[case.name][-1]["seconds_per_iteration"])
            print(f"{case.name}: {seconds} s  load {os.getloadavg()[0]:.1f}", flush=True)
    whole = {name: together(parts) for name, parts in runs.items()}
    # TRL's ranks do as many products a second as ours did in the same turns.
    rates = {case: [part["matmul_gflops"] for part in runs[case.name]] for case in cases if case.side == "engine"}
    of_peer = [rate for case, found in rates.items() if _gives_the_rate(case) for rate in found]
    columns = {
        case.name: summary(whole[case.name], case, statistics.median(rates.get(case) or of_peer)) for case in cases
    }
    return {"summary": columns, "cases": whole}


def _gives_the_rate(case: Case) -> bool:
    """That TRL is measured by."""
    return case.side == "engine" and case.ranks == 2


def case_table(columns: Columns) -> str:
    """One line per number and one column per case."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [" " * 28 + "".join(f"{name:>12}" for name in columns)]
    for name in names:
        cells = (f"{column[name]:12.2f}" if name in column else " " * 11 + "-" for column in columns.values())
        lines.append(f"{name:28}" + "".join(cells))
    return "\n".join(lines)


def target_rows(columns: Columns) -> list[dict]:
    """Those whose cases were run."""
    rows = []
    for target in TARGETS:
        try:
            value = target.value(columns)
        except KeyError:
            continue
        wanted = f"{target.bound} {target.target}"
        rows.append({"what": target.what, "measured": value, "target": wanted, "met": target.met(value)})
    return rows


def target_table(rows: list[dict]) -> str:
    lines = ["| | Measured | Target | |", "|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['measured']:.2f} | {row['target']} | {'met' if row['met'] else 'missed'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; all but the last when none is named"
    )
    parser.add_argument("--without_peer", action="store_true", help="no TRL, which needs the extra `bench`")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of each case, over both turns")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--peer_micro_batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; each turn has the next one")
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()
    if args.iterations < 1:
        raise ValueError(f"--iterations {args.iterations} must be at least 1")
    cases = [CASES[name] for name in args.cases or (name for name in CASES if not CASES[name].is_for_a_gpu)]
    cases = [case for case in cases if case.side == "engine" or not args.without_peer]
    if not cases or (any(case.side == "trl" for case in cases) and not any(_gives_the_rate(case) for case in cases)):
        raise ValueError(
            "the matrix rate that times are compared with is measured by `fixed` or another case on two ranks"
        )

    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    loads = [os.getloadavg()]
    result = measured(cases, args)
    loads.append(os.getloadavg())
    versions = {name: v for whole in result["cases"].values() for name, v in whole["versions"].items()}
    rows = target_rows(result["summary"])
    print(f"\n{case_table(result['summary'])}\n\n{target_table(rows)}")
    said = " ".join(f"{load[0]:.1f}" for load in loads)
    print(f"\nversions {versions}\nload at the start and at the end {said}, {os.cpu_count()} cores")
    if args.output:
        report = {
            "started": started,
            "arguments": {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items()},
            "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
            "load_at_start": loads[0],
            "load_at_end": loads[1],
            "versions": versions,
            "targets": rows,
            **result,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    """Its name, where Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
