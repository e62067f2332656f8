"""How far a run is, on the terminal it was started from."""

import sys
from collections.abc import Sequence
from time import monotonic

from tqdm import tqdm

FORM = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"


class ProgressBar:
    """On a terminal a bar, with the phase under way, tokens per second and the time left. Anywhere else a line per
    iteration, without control characters.
    """

    def __init__(self, total: int, *, done: int, shown: Sequence[str]):
        """
        Args:
            total: iterations of the whole run.
            done: those that a run which goes on has behind it.
            shown: metrics, where an iteration has them.
        """
        self.total, self.shown = total, shown
        on_terminal = sys.stderr.isatty() and sys.stdout.isatty()  # `| tee run.log` wants lines
        self.bar = tqdm(
            total=total, initial=done, desc="start", bar_format=FORM, dynamic_ncols=True, disable=not on_terminal
        )
        self._count_from(done)

    def phase(self, name: str) -> None:
        """What begins: generate, score, train, save."""
        self.bar.set_description_str(name)

    def advance(self, iteration: int, metrics: dict[str, float]) -> None:
        """An iteration is over."""
        said = [f"{name} {metrics[name]:.4g}" for name in self.shown if name in metrics]
        speed = [f"{value:,.0f} tokens/s" for name, value in metrics.items() if name.startswith("speed/")][:1]
        if not self.bar.disable:
            self.bar.set_postfix_str("  ".join(said + speed), refresh=False)
            self.bar.n = iteration
            self.bar.refresh()
            return
        seconds = [value for name, value in metrics.items() if name.startswith("time/")]
        took = [f"{sum(seconds):.2f} s"] if seconds else []
        left = [f"{self._left(iteration)} left"] if self.since is not None else []
        if self.since is None:  # what comes before the first iteration's end comes once
            self.counted_from, self.since = iteration, monotonic()
        print("  ".join([f"iteration {iteration}/{self.total}", *said, *took, *speed, *left]), flush=True)

    def go_back_to(self, iteration: int) -> None:
        """The iterations after this one come again."""
        self.bar.reset()
        self.bar.initial = self.bar.n = iteration
        self.bar.refresh()
        self._count_from(iteration)

    def say(self, sentence: str) -> None:
        """A line that the bar leaves alone."""
        if self.bar.disable:
            print(sentence, flush=True)
        else:
            self.bar.write(sentence)

    def close(self) -> None:
        self.bar.close()

    def _count_from(self, iteration: int) -> None:
        self.counted_from, self.since = iteration, None

    def _left(self, iteration: int) -> str:
        per_iteration = (monotonic() - self.since) / (iteration - self.counted_from)
        return tqdm.format_interval(per_iteration * (self.total - iteration))
