"""What a run reports, from global rank 0."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from engine.config import PPOConfig, SupervisedConfig, as_dict
from engine.config.secrets import shown as shown_settings
from engine.tracking.files import FILES, as_line, cut_after, set_aside
from engine.tracking.progress_bar import ProgressBar
from engine.tracking.summary import summary, written_plan
from engine.tracking.versions import write_versions
from engine.tracking.wandb_run import WandbRun


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
        device: str = "cpu",
        world_size: int = 1,
    ):
        """
        Args:
            config: the run's.
            shown: the metrics of the progress line and of the summary, where there are any.
            resumed_at: the iteration that a run goes on after. What its files say of later ones is dropped: these
                come again.
            wandb_id: of the W&B run that it goes on with.
            device, world_size: for `versions.json`.

        Raises:
            ValueError: `config.output_dir` cannot be written to.
        """
        self.is_main, self.shown = is_main, shown
        if not is_main:
            return
        self.config, self.output_dir, self.done = config, Path(config.output_dir), resumed_at
        run_config = shown_settings(as_dict(config))
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if resumed_at > 0:
                    cut_after(self.output_dir / name, resumed_at)
                else:
                    set_aside(self.output_dir / name)
            (self.output_dir / "config.yaml").write_text(yaml.safe_dump(run_config, sort_keys=False))
            made_with = write_versions(self.output_dir, device=device, world_size=world_size)
            (self.output_dir / "metrics.jsonl").touch()
        except OSError as error:
            raise ValueError(f"output_dir={self.output_dir} cannot be written to: {error}") from error
        self.bar = ProgressBar(num_iterations, done=resumed_at, shown=shown)
        told = run_config | {"git_commit": made_with["git_commit"], "memory_plan": written_plan(self.output_dir)}
        self.wandb = WandbRun(self.output_dir, config.tracking, told, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run, where there is one."""
        return self.wandb.id if self.is_main else None

    def phase(self, name: str, iteration: int) -> None:
        """What the run begins to do; as the callbacks called `on_phase` are told."""
        del iteration  # the bar counts those that are over
        if self.is_main:
            self.bar.phase(name)

    def log(
        self,
        iteration: int,
        metrics: dict[str, float],
        samples: list[dict[str, Any]],
        histograms: dict[str, Sequence[float]] | None = None,
    ) -> None:
        """One iteration: its metrics, a few of its responses, and what W&B shows as histograms."""
        if not self.is_main:
            return
        self.done = iteration
        self._write("metrics", [{"iteration": iteration, **metrics}])
        self._write("samples", samples)
        self.bar.advance(iteration, metrics)
        self.wandb.log(iteration, metrics, tables={"samples/train": samples}, histograms=histograms or {})

    def warn(self, iteration: int, name: str, sentence: str) -> None:
        """Something is wrong with the run's numbers: aloud, in `warnings.jsonl`, and as an alert of W&B's."""
        if not self.is_main:
            return
        self.bar.say(f"Warning: iteration {iteration}: {sentence}")
        self._write("warnings", [{"iteration": iteration, "warning": name, "sentence": sentence}])
        self.wandb.alert(name, f"iteration {iteration}: {sentence}")

    def evaluation(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """The held-out prompts after an iteration: `evaluation.jsonl`, and each response in `evaluation_samples.jsonl`.

        Args:
            metrics: names begin with `eval/`.
        """
        if not self.is_main:
            return
        said = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.bar.say(f"evaluation after iteration {iteration}: {said}")
        self._write("evaluation", [{"iteration": iteration, **metrics}])
        self._write("evaluation_samples", [{"iteration": iteration, **row} for row in samples])
        self.wandb.log(iteration, metrics, tables={"samples/evaluation": samples}, histograms={})

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
        self.done = iteration
        self.bar.go_back_to(iteration)

    def _sum_up(self) -> None:
        given = dict(done=self.done, of=self.bar.total, shown=self.shown, wandb=self.wandb.where)
        try:
            print(summary(self.config, **given), flush=True)
        except OSError as error:
            print(f"WARNING: {self.output_dir} CANNOT BE READ ({error}): there is no summary.", flush=True)

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a file of the run's. A full disk does not end the run."""
        if not rows:
            return
        try:
            with open(self.output_dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(as_line(row) for row in rows)
        except OSError as error:
            print(f"WARNING: {name}.jsonl CANNOT BE WRITTEN ({error}); the run goes on.", flush=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_main:
            return
        self.bar.close()
        self.wandb.close(exit_code=0 if error is None else 1)
        if error is None:
            self._sum_up()
