"""The run's W&B run, on global rank 0: curves, tables of samples, histograms, alerts."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import TrackingConfig

UPLOAD_S = 120.0  # at the end of a run; what is left by then stays on the disk
FLUSH_S = 2.0  # of a run that is killed, the offline file holds all but its last seconds
TIMES = dict(x_transaction_log_flush_interval=FLUSH_S, finish_timeout=UPLOAD_S, finish_timeout_raises=True)
IDLE = "60s"  # after which the service process ends, when nobody is connected to it


class WandbRun:
    """One W&B run, begun or gone on with. Whatever fails ends it with one line, and the training goes on.

    Attributes:
        id: for the run that goes on with this one; None without W&B.
        where: how to see it, once it has begun: the command that uploads it, or its address.
    """

    def __init__(self, output_dir: Path, config: TrackingConfig, run_config: dict[str, Any], wandb_id: str | None):
        """
        Args:
            run_config: what is known of the run, for W&B's config.
            wandb_id: of the run to go on with.
        """
        self.run, self.id, self.where = None, wandb_id, None
        self.ours: list[str] = []  # names that the environment does not have otherwise
        if config.wandb != "disabled":
            with self._or_give_up("did not start"):
                self._begin(output_dir, config, run_config)

    def log(
        self,
        iteration: int,
        metrics: dict[str, float],
        *,
        tables: dict[str, list[dict[str, Any]]],
        histograms: dict[str, Sequence[float]],
    ) -> None:
        """Numbers of an iteration, under names of the form `group/name`. Iterations may come in any order."""
        if self.run is None:
            return
        import wandb

        with self._or_give_up("failed"):
            counted = {name: [v for v in values if math.isfinite(v)] for name, values in histograms.items()}
            row = {name: wandb.Histogram(values) for name, values in counted.items() if values}
            row |= {name: _table(rows) for name, rows in tables.items() if rows}
            self.run.log({"iteration": iteration, **metrics, **row})

    def alert(self, title: str, text: str) -> None:
        """W&B writes to whoever has asked it to."""
        if self.run is not None:
            with self._or_give_up("failed"):
                self.run.alert(title=title, text=text, level="WARN")

    def close(self, *, exit_code: int) -> None:
        if self.run is not None:
            import wandb

            try:
                self.run.finish(exit_code=exit_code)
                wandb.teardown()  # the service process hears that nobody is left
            except (Exception, SystemExit) as error:  # wandb 0.31 leaves with the exit code of its service
                print(f"W&B did not close its run ({type(error).__name__}: {error}).", flush=True)
        for name in self.ours:
            os.environ.pop(name, None)

    def _begin(self, output_dir: Path, config: TrackingConfig, run_config: dict[str, Any]) -> None:
        self._set("WANDB_DATA_DIR", str((output_dir / "wandb" / "data").absolute()))  # tables wait there for upload
        import wandb

        mode = config.wandb
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            print(f"W&B has no key here: offline. Later: wandb login, wandb sync {output_dir}/wandb/offline-run-*")
        if "WANDB_SERVICE" not in os.environ and (address := _own_service()):
            self._set("WANDB_SERVICE", address)
        self.run = wandb.init(
            project=config.project,
            name=config.run_name,
            dir=str(output_dir),
            config=run_config,
            mode=mode,
            id=self.id,
            resume=None if self.id is None else "allow",
            settings=wandb.Settings(silent=True, **TIMES),
        )
        self.id = self.run.id
        self.where = self.run.url if mode == "online" else f"wandb sync {output_dir}/wandb/offline-run-*"
        self.run.define_metric("iteration", hidden=True)
        self.run.define_metric("*", step_metric="iteration")

    def _set(self, name: str, value: str) -> None:
        """A name of the environment, where the user has not set it."""
        if name not in os.environ:
            os.environ[name] = value
            self.ours.append(name)

    @contextmanager
    def _or_give_up(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the network, the disk, the service: none may end the run
            print(f"W&B {what} ({type(error).__name__}: {error}); going on without it.", flush=True)
            self.run = None


def _own_service() -> str | None:
    """Start the process that writes W&B's files as nobody's child; its address, or None where it does not start.

    W&B would start it below this rank, and the deepspeed launcher, told to stop, ends a rank with all below it: the
    rank finishes its step and saves, but its W&B run would be without an end.
    """
    command = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", IDLE]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # W&B then starts one its own way
        return None


def _table(rows: list[dict[str, Any]]) -> Any:
    """Rows may lack columns; what is neither text nor number is shown as JSON."""
    import wandb

    columns = list(dict.fromkeys(name for row in rows for name in row))
    data = [[_cell(row.get(name)) for name in columns] for row in rows]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
