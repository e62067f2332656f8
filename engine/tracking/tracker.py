"""What a run reports, from global rank 0."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from tqdm import tqdm

from engine.config import PPOConfig, SupervisedConfig, as_dict
from engine.config.secrets import shown as shown_settings
from engine.tracking.files import FILES, as_line, cut_after, set_aside
from engine.tracking.wandb_run import wandb_run


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
                    cut_after(output_dir / name, resumed_at)
                else:
                    set_aside(output_dir / name)
            (output_dir / "config.yaml").write_text(yaml.safe_dump(run_config, sort_keys=False))
            (output_dir / "metrics.jsonl").touch()
        except OSError as error:
            raise ValueError(f"output_dir={output_dir} cannot be written to: {error}") from error
        self.bar = tqdm(total=num_iterations, initial=resumed_at, unit="iteration", disable=not sys.stderr.isatty())
        self.wandb = wandb_run(output_dir, config.tracking, run_config, wandb_id)

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

    def evaluation(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """The held-out prompts after an iteration: `evaluation.jsonl`, and each response in `evaluation_samples.jsonl`.

        Args:
            metrics: names begin with `eval/`.
        """
        if not self.is_main:
            return
        self._write("evaluation", [{"iteration": iteration, **metrics}])
        self._write("evaluation_samples", [{"iteration": iteration, **row} for row in samples])

    def token_view(self, iteration: int, view: dict[str, Any]) -> None:
        """One response token by token, in `token_views.jsonl`."""
        if self.is_main:
            self._write("token_views", [{"iteration": iteration, **view}])

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
                cut_after(self.output_dir / name, iteration)
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
                file.writelines(as_line(row) for row in rows)
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
            except Exception as failure:  # the network, the disk, the service
                print(f"W&B did not close its run ({type(failure).__name__}: {failure}).", flush=True)
