"""One loop for SFT, reward model and DPO: they differ in the objective they are given.

Every rank holds the same examples and draws the same minibatches; it works on the share that the plan deals it. Numbers
per sequence are put together on all ranks, so that metrics do not depend on how many there are.
"""

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from engine.config import SupervisedConfig
from engine.data import Examples
from engine.data.batches import Endless
from engine.distributed import comm
from engine.distributed.gather import left_in_shards
from engine.distributed.initialize import Engine
from engine.distributed.micro_batches import marking_last, my_micro_batches, one_number_per_row
from engine.distributed.optimization import accumulate, step_together
from engine.models.language_model import check_packing
from engine.tracking import Tracker
from engine.trainers.checkpoints import Checkpoints
from engine.trainers.objectives import Objective

COUNTS = ("iteration", "skipped_steps", "skipped_in_a_row")


class SupervisedTrainer:
    """Takes optimizer steps of one model on minibatches of examples."""

    def __init__(self, model: Engine, objective: Objective, config: SupervisedConfig):
        self.model, self.objective, self.config = model, objective, config
        self.iteration = self.skipped_steps = self.skipped_in_a_row = 0
        self.on_phase: Callable[[str, int], None] | None = None  # told what begins
        self.resumed_at: int | None = None  # minibatches that those given to `train` have been drawn for
        if config.packing:
            model.eval()
            check_packing(model.module.model)

    def train(
        self,
        minibatches: Iterable[Examples],
        num_iterations: int,
        tracker: Tracker,
        held_out: Examples | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> bool:
        """The whole run; `minibatches` is gone through as often as that takes.

        Args:
            held_out: evaluated before the first step, every `eval_every` steps, and after the last.
            checkpoints: where the run saves; a run without any cannot be asked to stop.

        Returns:
            Whether it came to its end; False when it was asked to stop, and has saved.
        """
        batches, resumed = Endless(minibatches, drawn=self.resumed_at), bool(self.resumed_at)
        self.resumed_at = None
        if held_out is not None:
            held_out = self.objective.prepared(held_out)
            if not resumed:
                tracker.log(0, self.evaluate(held_out), [])
        while self.iteration < num_iterations:
            if checkpoints is not None and checkpoints.stop_asked():
                checkpoints.stop(self.iteration, self.snapshot, tracker)
                return False
            metrics = self.step(next(batches))
            every, last = self.config.eval_every, self.iteration == num_iterations
            if held_out is not None and (last or (every is not None and self.iteration % every == 0)):
                metrics |= self.evaluate(held_out)
            tracker.log(self.iteration, metrics, [])
            if checkpoints is not None:
                checkpoints.after(self.iteration, self.snapshot, tracker)
        return True

    @property
    def iterations_done(self) -> int:
        """Those that are over."""
        return self.iteration

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the trainer would need to go on from here, besides the model."""
        return {name: getattr(self, name) for name in COUNTS}, {}

    def go_on_from(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `snapshot` said; the model has been put back."""
        del tensors
        for name in COUNTS:
            setattr(self, name, state[name])
        self.resumed_at = self.iteration

    def step(self, examples: Examples) -> dict[str, float]:
        """One optimizer step on a minibatch: on all ranks, or, if a number is not finite on any, on none.

        A collective.

        Returns:
            The step's metrics; the losses are those before the step.

        Raises:
            RuntimeError: `max_skipped_steps` steps in a row were skipped.
        """
        started = perf_counter()
        self.iteration += 1
        if self.on_phase is not None:
            self.on_phase("train", self.iteration)
        examples = self.objective.prepared(examples)
        numbers = torch.zeros(len(examples.sequences), device=comm.device())
        healthy = True
        self.model.train()
        micro_batches = my_micro_batches(
            examples.sequences,
            token_budget=self.config.micro_batch_tokens * examples.rows_per_example,
            rows_together=examples.rows_per_example,
            packed=self.config.packing,
        )
        for batch, last in marking_last(micro_batches):
            of_rows = self.objective.number(self.model, batch)
            loss = self.objective.loss(of_rows, batch.rows, examples)
            numbers[batch.rows] = of_rows.detach()
            healthy &= bool(loss.isfinite())
            accumulate(self.model, loss, last=last)
        numbers = comm.sum_over_ranks(numbers).cpu()
        learning_rate = self.model.get_lr()[0]
        norms = step_together([self.model], healthy=healthy)
        self._count_skips(norms is None)
        seconds = perf_counter() - started
        return {
            **{f"train/{name}": value for name, value in self.objective.metrics(numbers, examples).items()},
            "grad_norm": norms[0] if norms is not None else float("nan"),
            "lr": learning_rate,
            "skipped/steps": self.skipped_steps,
            "time/step_s": seconds,
            "speed/tokens_per_s": int(examples.sequences.lengths.sum()) / seconds,
            "memory/peak_gib": comm.max_over_ranks(comm.peak_memory_gib()),
        }

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The objective's metrics of these examples, as `eval/...`. No gradients. A collective."""
        prepared = self.objective.prepared(examples)
        numbers = self.numbers(prepared)
        return {f"eval/{name}": value for name, value in self.objective.metrics(numbers, prepared).items()}

    def numbers(self, examples: Examples) -> Tensor:
        """(B,) the objective's number of every sequence, on the CPU and the same on every rank. A collective."""
        self.model.eval()
        with left_in_shards(self.model):
            return one_number_per_row(
                lambda batch: self.objective.number(self.model, batch),
                examples.sequences,
                token_budget=self.config.micro_batch_tokens * examples.rows_per_example,
                rows_together=examples.rows_per_example,
                packed=self.config.packing,
            )

    def _count_skips(self, skipped: bool) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        said = f"step {self.iteration}: skipped on all ranks, a loss or a gradient is not finite"
        if comm.is_main():
            print(said, flush=True)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise RuntimeError(f"{said}; {self.skipped_in_a_row} in a row, the run stops.")
