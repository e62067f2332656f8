"""Metrics and samples of a run, from global rank 0: a progress line, `metrics.jsonl`, `samples.jsonl` and W&B.

The names every PPO iteration reports:

    score/mean score/std score/failed          of whole responses; how many nobody could score
    reward/kl_penalty kl/ref_mean kl/coef      the penalty and the KL to the ref per response, and the coefficient
    loss/policy loss/value                     means over the response tokens of all ranks
    policy/clip_fraction policy/approx_kl policy/ratio_max policy/first_log_ratio_max policy/entropy
    value/explained_variance value/clip_fraction
    response/length_mean response/eos_fraction
    grad_norm/actor grad_norm/critic lr/actor lr/critic
    skipped/steps                              since the run started
    time/generate_s time/score_s time/train_s speed/response_tokens_per_s memory/peak_gib
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from tqdm import tqdm

from engine.config import PPOConfig, SupervisedConfig, TrackingConfig, as_dict
from engine.config.secrets import shown as shown_settings

FILES = ("metrics.jsonl", "samples.jsonl", "warnings.jsonl", "quarantine.jsonl")


class Tracker:
    """Writes what a run reports. On all ranks but the main one every method does nothing.

    A logger that fails never stops training: W&B is then given up with a warning; the files go on.
    """

    def __init__(
        self,
        config: PPOConfig | SupervisedConfig,
        *,
        num_iterations: int,
        is_main: bool,
        shown: Sequence[str] = ("score/mean", "kl/ref_mean", "response/length_mean"),
        resumed_at: int = 0,
        wandb_id: str | None = None,
    ):
        """
        Args:
            config: the run's.
            shown: the metrics of the progress line, where an iteration has them.
            resumed_at: the iteration that a run goes on after. What its files say of later ones is dropped: these
                come again.
            wandb_id: of the W&B run that it goes on with.

        Raises:
            ValueError: `config.output_dir` cannot be written to.
        """
        self.is_main, self.shown = is_main, shown
        if not is_main:
            return
        run_config, output_dir = shown_settings(as_dict(config)), Path(config.output_dir)
        self.output_dir = output_dir
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if resumed_at > 0:
                    _cut_after(output_dir / name, resumed_at)
                else:
                    _set_aside(output_dir / name)
            (output_dir / "config.yaml").write_text(yaml.safe_dump(run_config, sort_keys=False))
            (output_dir / "metrics.jsonl").touch()
        except OSError as error:
            raise ValueError(f"output_dir={output_dir} cannot be written to: {error}") from error
        self.bar = tqdm(total=num_iterations, initial=resumed_at, unit="iteration", disable=not sys.stderr.isatty())
        self.wandb = _wandb_run(output_dir, config.tracking, run_config, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run, where there is one."""
        return self.wandb.id if self.is_main and self.wandb is not None else None

    def log(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """One iteration: its metrics and a few of its responses."""
        if not self.is_main:
            return
        self._write("metrics", [{"iteration": iteration, **metrics}])
        self._write("samples", samples)
        self.bar.update(iteration - self.bar.n)
        said = "  ".join(f"{name} {metrics[name]:.4g}" for name in self.shown if name in metrics)
        self.bar.set_postfix_str(said)
        if self.bar.disable:
            seconds = [value for name, value in metrics.items() if name.startswith("time/")]
            took = f"  {sum(seconds):.2f} s" if seconds else ""
            print(f"iteration {iteration}/{self.bar.total}  {said}{took}", flush=True)
        self._to_wandb(iteration, metrics, samples)

    def warn(self, iteration: int, name: str, sentence: str) -> None:
        """Something is wrong with the run's numbers: aloud, and in `warnings.jsonl`."""
        if not self.is_main:
            return
        print(f"Warning: iteration {iteration}: {sentence}", flush=True)
        self._write("warnings", [{"iteration": iteration, "warning": name, "sentence": sentence}])

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        """Responses with which a step could not be taken, in `quarantine.jsonl`."""
        if self.is_main:
            self._write("quarantine", rows)

    def go_back_to(self, iteration: int) -> None:
        """Drop what has been said of later iterations: these come again."""
        if not self.is_main:
            return
        try:
            for name in FILES:
                _cut_after(self.output_dir / name, iteration)
        except OSError as error:
            print(f"WARNING: {self.output_dir / name} CANNOT BE WRITTEN ({error}); the run goes on.", flush=True)
        self.bar.reset()
        self.bar.update(iteration)

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a file of the run's. A full disk does not end the run."""
        if not rows:
            return
        try:
            with open(self.output_dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
        except OSError as error:
            print(f"WARNING: {name}.jsonl CANNOT BE WRITTEN ({error}); the run goes on.", flush=True)

    def _to_wandb(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        if self.wandb is None:
            return
        import wandb

        try:
            table = (
                wandb.Table(columns=list(samples[0]), data=[list(row.values()) for row in samples]) if samples else None
            )
            self.wandb.log({"iteration": iteration, **metrics, **({"samples": table} if table is not None else {})})
        except Exception as error:  # the network, the disk, the service: none may end the run
            print(f"W&B failed ({type(error).__name__}: {error}); going on without it.", flush=True)
            self.wandb = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_main:
            return
        self.bar.close()
        if self.wandb is not None:
            try:
                self.wandb.finish(exit_code=0 if error is None else 1)
            except Exception as failure:  # as in _to_wandb
                print(f"W&B did not close its run ({type(failure).__name__}: {failure}).", flush=True)


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN or inf: a number that is not finite is written as null.
    plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size > 0:  # a run that failed at its start leaves an empty one
        print(f"{path} is from an earlier run: kept as {path.stem}.previous{path.suffix}.", flush=True)
        path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))


def _cut_after(path: Path, iteration: int) -> None:
    """Leave the lines of iterations up to this one; a line that broke off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines(): texts hold other ends of lines
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["iteration"] <= iteration:
            kept.append(f"{line}\n")
    half_done = path.with_name(path.name + ".partial")
    half_done.write_text("".join(kept), encoding="utf-8")
    half_done.replace(path)


def _wandb_run(output_dir: Path, config: TrackingConfig, run_config: dict[str, Any], wandb_id: str | None):
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            project=config.project,
            name=config.run_name,
            dir=str(output_dir),
            config=run_config,
            mode=config.wandb,
            id=wandb_id,
            resume=None if wandb_id is None else "allow",
            settings=wandb.Settings(silent=True),
        )
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run
    except Exception as error:  # as in _to_wandb
        print(f"W&B did not start ({type(error).__name__}: {error}); going on without it.", flush=True)
        return None
