"""How an iteration's time and memory grow with tokens, vocabulary, ranks and model size, and the law they follow.

    python tests/benchmarks/scaling.py --output tests/benchmarks/results/scaling.json

One thing is varied at a time about the benchmark's `fixed` workload, each in four sizes at least, every size as
processes of its own. A straight line is fitted to each series by least squares; the largest relative distance of a
measured point from it says whether it is one. Writes the numbers and, beside them, the plot (FILE.svg).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_ppo import Case, processor, run
from operations import backbone_weights
from workload import Workload, write_models

FIXED = Case("fixed")
STRAIGHT = 0.1  # what is off by more is on no line


@dataclass(frozen=True)
class Series:
    """One thing in several sizes, and the quantity in which its time and memory are a line."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    workload: Callable[[int], Workload]
    x: Callable[[Workload], float]
    flags: tuple[str, ...] = ()


def of_hidden_size(hidden: int) -> Workload:
    """Heads of 64, and an MLP of 8/3 the width, as in the benchmark's models."""
    return replace(FIXED.workload, hidden_size=hidden, num_heads=hidden // 64, intermediate_size=hidden * 8 // 3)


def weights(workload: Workload) -> int:
    """Of all four models: two have an embedding and a projection to the vocabulary, two an embedding only."""
    return 4 * backbone_weights(workload) + 6 * workload.vocab_size * workload.hidden_size


SERIES = [
    Series(
        "tokens",
        "thousand tokens in sequences of an iteration",
        (16, 32, 64, 128),
        lambda tokens: replace(FIXED.workload, max_new_tokens=tokens, mean_response_tokens=float(tokens)),
        lambda w: w.num_prompts * (w.mean_prompt_tokens + w.max_new_tokens) / 1e3,
    ),
    Series(
        "vocabulary",
        "thousand entries",
        (4096, 8192, 16384, 32768),
        lambda entries: replace(FIXED.workload, vocab_size=entries),
        lambda w: w.vocab_size / 1e3,
    ),
    Series(
        "ranks",
        "1 / ranks, ZeRO 3, the same prompts in all",
        (1, 2, 4, 8),
        FIXED.workload.on,
        lambda w: 1 / w.world_size,
        flags=("--zero_stage", "3"),
    ),
    Series(
        "model",
        "million weights of all four models",
        (192, 384, 576, 768),
        of_hidden_size,
        lambda w: weights(w) / 1e6,
    ),
]


@dataclass(frozen=True)
class Point:
    """One size, measured."""

    size: int
    x: float
    seconds: float
    peak_gib: float


@dataclass(frozen=True)
class Line:
    """y = start + slope x, and how far a measured point lies from it at most, as a share of itself."""

    start: float
    slope: float
    off: float

    @classmethod
    def through(cls, x: list[float], y: list[float]) -> "Line":
        """By least squares."""
        slope, start = np.polyfit(x, y, 1)
        off = max(abs(start + slope * one - other) / other for one, other in zip(x, y, strict=True))
        return cls(float(start), float(slope), float(off))


def measured(series: Series, size: int, args: argparse.Namespace) -> Point:
    workload = series.workload(size)
    case = replace(FIXED, ranks=workload.world_size, flags=series.flags)
    with tempfile.TemporaryDirectory() as folder:
        write_models(folder, workload)
        result = run(case, Path(folder), iterations=args.iterations, micro_batch_size=4, seed=0)
    return Point(
        size=size,
        x=series.x(workload),
        seconds=statistics.median(result["seconds_per_iteration"]),
        peak_gib=max(result["peak_rss_gib"]),
    )


def plot(found: dict[str, list[Point]], laws: dict[str, dict[str, Line]], path: Path) -> None:
    """Two rows, time above memory, a column per series: points, and the line where they lie on one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same numbers, the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 6), layout="constrained", squeeze=False)
    axis_of = {series.name: series.axis for series in SERIES}
    for column, (name, points) in enumerate(found.items()):
        x = [point.x for point in points]
        for row, (quantity, label, colour) in enumerate(
            (("seconds", "s per iteration", "#0072B2"), ("peak_gib", "peak GiB of a rank", "#D55E00"))
        ):
            axis, line = axes[row][column], laws[name][quantity]
            if line.off < STRAIGHT:
                axis.plot([0, max(x)], [line.start, line.start + line.slope * max(x)], color="0.6", linewidth=1)
            axis.plot(x, [getattr(point, quantity) for point in points], "o", color=colour)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(axis_of[name])
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel(label)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", choices=[*(series.name for series in SERIES), []])
    parser.add_argument("--iterations", type=int, default=2, help="timed iterations of each size")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the plot is written beside it")
    args = parser.parse_args()

    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found: dict[str, list[Point]] = {}
    for series in SERIES:
        if args.series and series.name not in args.series:
            continue
        found[series.name] = []
        for size in series.sizes:
            point = measured(series, size, args)
            found[series.name].append(point)
            print(f"{series.name} {size}: {point.seconds:.2f} s, {point.peak_gib:.2f} GiB", flush=True)
    laws = {
        name: {
            quantity: Line.through([point.x for point in points], [getattr(point, quantity) for point in points])
            for quantity in ("seconds", "peak_gib")
        }
        for name, points in found.items()
    }
    for name, lines in laws.items():
        for quantity, line in lines.items():
            print(f"{name}, {quantity}: {line.start:.3g} + {line.slope:.3g} x, at most {line.off:.0%} off")
    report = {
        "started": started,
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "load_at_end": os.getloadavg(),
        "points": {name: [vars(point) for point in points] for name, points in found.items()},
        "lines": {name: {quantity: vars(line) for quantity, line in lines.items()} for name, lines in laws.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    plot(found, laws, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
