"""PPO for language models: generate, score, shape rewards, estimate advantages, take clipped steps.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.

What one iteration leaves behind (`Experience`) is the same on every rank: each rank generates and scores a part, and
the parts are put together. All that follows (whitening, minibatches, metrics, the verdict on what is not finite) is
computed from the same numbers everywhere and needs no further agreement.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from engine.algorithms.rewards import length_penalties
from engine.config import PPOConfig
from engine.data import Examples, PromptBatch, PromptDataset
from engine.data.batches import Endless
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.environments import load_environment
from engine.rollout.episodes import Episodes, played_episodes
from engine.rollout.experience import Experience, shaped_experience
from engine.rollout.generation import Responses, eos_token_ids_of
from engine.rollout.measuring import Drawn, drawn_on_all_ranks, measure, sequences_of_all_ranks
from engine.rollout.sampler import Sampler
from engine.rollout.scoring import Scored, Scoring
from engine.tracking import Tracker
from engine.trainers.checkpoints import Checkpoints
from engine.trainers.evaluation import Evaluation
from engine.trainers.going_on import go_back, put_back, snapshot_of
from engine.trainers.guards import quarantine_rows, ran_away
from engine.trainers.health import planned_and_measured, signs_of_trouble
from engine.trainers.own_loop import check_groups, scored_sequences
from engine.trainers.phases import phase
from engine.trainers.ppo_metrics import (
    ended,
    experience_metrics,
    histograms_of,
    sample_rows,
    step_metrics,
    token_view,
)
from engine.trainers.ppo_update import PPOUpdate
from engine.trainers.progress import Progress, next_kl_coef, next_penalty_coef


class DeepSpeedPPOTrainer:
    """Alternates `generate_experience` and `train_rlhf` on the models of a `DeepSpeedRLHFEngine`."""

    def __init__(
        self,
        rlhf_engine: DeepSpeedRLHFEngine,
        args: PPOConfig,
        pretraining: Iterable[Examples] | None = None,
        on_phase: Callable[[str, int], None] | None = None,
        held_out: PromptDataset | None = None,
        planned_gib: float | None = None,
    ):
        """
        Args:
            pretraining: minibatches of demonstrations, of all ranks, for `args.pretraining`.
            held_out: the prompts of `args.data.eval`, the same on every rank.
            on_phase: told the phase (generate, score, train, evaluate) and the iteration whenever one begins.
            planned_gib: the memory that a rank is planned to take; reported beside what it takes.
        """
        if (pretraining is None) != (args.pretraining is None):
            raise ValueError(
                "args.pretraining and the trainer's minibatches of demonstrations go together: pass "
                "create_pretraining_dataset(args, tokenizer)."
            )
        self.config, self.rlhf_engine, self.tokenizer = args, rlhf_engine, rlhf_engine.tokenizer
        self.on_phase, self.planned_gib = on_phase, planned_gib
        self.actor, self.ref = rlhf_engine.actor, rlhf_engine.ref
        self.critic, self.reward = rlhf_engine.critic, rlhf_engine.reward
        self.eos_token_ids = eos_token_ids_of(self.actor.module.model, self.tokenizer)
        self.sampler = Sampler(self.actor, self.tokenizer, args, eos_token_ids=self.eos_token_ids)
        self.scoring = Scoring(
            args,
            reward=self.reward,
            tokenizer=self.tokenizer,
            reward_tokenizer=rlhf_engine.reward_tokenizer if rlhf_engine.reward_reads_text else None,
            eos_token_ids=self.eos_token_ids,
        )
        with comm.same_error_everywhere():
            self.environment = load_environment(args.rollout.environment)
        self.update = PPOUpdate(rlhf_engine, args, pretraining)
        self.evaluation = Evaluation(self, held_out)
        self.progress = Progress(kl_coef=args.kl_coef, penalty_coef=args.penalty_coef)
        self.seconds: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.samples: list[dict[str, Any]] = []
        self.unscored = 0
        self.compared = False  # the memory that was planned with what was taken
        self.told: list[str] = []  # signs of trouble, each once in a run
        self.quarantined: list[dict[str, Any]] = []
        self.in_flight: Experience | None = None  # of an iteration that is not over
        self.resumed_at: int | None = None  # iterations that the prompts given to `train` have been drawn for
        self.drawn = 0  # responses that `generate` has drawn since the last step

    def train(
        self,
        prompts: Iterable[PromptBatch],
        num_iterations: int,
        tracker: Tracker,
        checkpoints: Checkpoints | None = None,
    ) -> bool:
        """The whole run; `prompts` is gone through as often as that takes.

        Args:
            checkpoints: where the run saves; a run without any cannot be asked to stop.

        Returns:
            Whether it came to its end; False when it was asked to stop, and has saved.
        """
        batches, self.resumed_at = Endless(prompts, drawn=self.resumed_at), None
        stop_asked = checkpoints.stop_asked if checkpoints is not None else lambda: False
        self.evaluation.begin(tracker)
        while self.in_flight is not None or self.progress.iteration < num_iterations:
            if self.in_flight is None and not stop_asked():
                self.in_flight = self.generate_experience(next(batches))
                if ran_away(self.in_flight, self.config.kl_guard):
                    go_back(self, checkpoints, tracker)
                    batches, self.resumed_at = Endless(prompts, drawn=self.resumed_at), None
                    continue
            try:
                finished = self.in_flight is not None and self.train_on(self.in_flight, stop_asked)
            finally:
                tracker.quarantine(self.quarantined)
                self.quarantined = []
            if not finished:
                checkpoints.stop(self.progress.iteration, self.snapshot, tracker)
                return False
            metrics, histograms = self.metrics(self.in_flight), histograms_of(self.in_flight)
            view, self.in_flight = token_view(self.in_flight, self.tokenizer), None
            tracker.log(self.progress.iteration, metrics, self.samples, histograms)
            if view is not None:
                tracker.token_view(self.progress.iteration, view)
            self._tell(metrics, tracker)
            try:
                self.evaluation.after(self.progress.iteration, tracker, last=self.progress.iteration == num_iterations)
            except ValueError:  # on every rank: a metric or a source of scores; what has been trained is kept
                if checkpoints is not None:
                    checkpoints.save(self.progress.iteration, self.snapshot, tracker)
                raise
            if checkpoints is not None:
                checkpoints.after(self.progress.iteration, self.snapshot, tracker)
        return True

    @property
    def iterations_done(self) -> int:
        """Those that are over."""
        return self.progress.iteration - (self.in_flight is not None)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the trainer would need to go on from here, besides the models: small things, and tensors."""
        return snapshot_of(self)

    def go_on_from(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `snapshot` said; the models have been put back."""
        put_back(self, state, tensors)

    def generate_experience(self, prompts: PromptBatch) -> Experience:
        """Responses to this rank's prompts, and all that PPO needs to train on those of all ranks.

        Begins an iteration: the next noise for the same prompts, and, when all is measured, the KL controller's next
        coefficient. Eval mode, no gradients. A collective; ranks may hold different numbers of prompts, or none.

        Raises:
            ValueError: on every rank, when a source of scores (see `Scoring.scores`) or an environment fails on any.
        """
        self._begin_iteration()
        for engine in filter(None, (self.actor, self.critic)):
            engine.eval()  # once: what follows leaves it at that
        prompts = prompts.repeated(self.config.rollout.samples_per_prompt)
        with self._timed("generate"):
            episodes = self.episodes(prompts)
            sequences = sequences_of_all_ranks(episodes.sequences)
            drawn = drawn_on_all_ranks(episodes.drawn)
        with self._timed("score"):
            scored = self.scoring.scores(prompts, episodes.drawn.tokens, sequences, episodes.conversations)
            experience = self._experience(sequences, drawn, scored)
        self.samples = self._samples(prompts, episodes, experience)
        self._quarantine(experience, experience.broken_rows, "a score or a measurement is not finite")
        return experience

    def generate(self, queries: Sequence[Sequence[int]]) -> list[list[int]]:
        """For those who hold the loop themselves: one response to each of this rank's queries, for `step`.

        Args:
            queries: token ids, lists or 1-D tensors. A collective under ZeRO-3; ranks may hold different numbers.

        Returns:
            Token ids, up to and including the end-of-sequence token. Another call draws others.

        Raises:
            ValueError: on every rank, when a query of any is empty, too long, or holds ids that are none.
        """
        with comm.same_error_everywhere():
            mine = self.rlhf_engine.given(queries, None, caller="generate()")
        with self._timed("generate"):
            rows = range(self.drawn, self.drawn + len(mine))  # each call's noise is its own
            keys = [(self.config.seed, self.progress.iteration + 1, comm.rank(), row) for row in rows]
            self.drawn += len(mine)
            return self.sampler.responses(
                [row.tolist() for row in mine.tokens.split(mine.lengths.tolist())], keys
            ).tokens

    def step(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], scores: Sequence[float]
    ) -> dict[str, float]:
        """For those who hold the loop themselves: one iteration of PPO on responses drawn and scored elsewhere.

        A collective; ranks may hold different numbers of responses. The responses to one query are neighbours where
        `advantage_estimator` compares them. Responses should be the present actor's: the ratios of PPO are those to the
        actor as it is when `step` is called.

        Args:
            queries, responses: this rank's, token ids, lists or 1-D tensors. What a response does not hold (its
                end-of-sequence token, say) is not learned.
            scores: of whole responses.

        Returns:
            The iteration's metrics, of all ranks.

        Raises:
            ValueError: on every rank, when lists do not fit together on any, a sequence is too long, or responses that
                are to be compared answer different queries.
        """
        self._begin_iteration()
        with comm.same_error_everywhere():
            mine, my_scores = scored_sequences(self.rlhf_engine, queries, responses, scores)
        with self._timed("score"):
            sequences = sequences_of_all_ranks(mine)
            check_groups(sequences, self.config)
            everyones = comm.concatenated(my_scores.to(comm.device())).cpu()
            scored = Scored(everyones, torch.zeros(len(everyones), dtype=torch.bool))
            experience = self._experience(sequences, None, scored)
        self.train_on(experience)
        self.seconds.setdefault("generate", 0.0)
        return self.metrics(experience)

    def _experience(self, sequences: Sequences, drawn: Drawn | None, scored: Scored) -> Experience:
        """All that PPO needs to train on these responses, of all ranks; moves the KL controller on. A collective."""
        measured = measure(
            sequences,
            drawn,
            recomputed=self.config.rollout.logprobs == "recomputed",
            actor=self.actor,
            ref=self.ref,
            critic=self.critic,
            kl_estimator=self.config.kl_estimator,
            temperature=self.config.rollout.temperature,
            chunk_tokens=self.config.logits_chunk_tokens,
            token_budget=self.config.micro_batch_tokens,
            gather_weights=self.config.rollout.weights == "gathered",
        )
        shaped_scores = self.shaped(scored, sequences)
        self.unscored = int(scored.failed.sum())
        if self.unscored:  # such rows stay in their minibatches, and have no tokens to learn from
            of_rows = scored.failed.repeat_interleave(sequences.response_lengths)
            sequences, measured = sequences.without_responses(scored.failed), measured.of(~of_rows)
        experience = shaped_experience(
            sequences,
            scored.scores,
            measured,
            shaped_scores=shaped_scores,
            kl_coef=self.progress.kl_coef,
            kl_placement=self.config.kl_placement,
            advantage_estimator=self.config.advantage_estimator,
            whitened=self.config.whitened,
            group_size=self.config.rollout.samples_per_prompt,
            gamma=self.config.gamma,
            lam=self.config.lam,
            value_label=self.config.value_label,
            left_out=scored.failed,
        )
        self.progress.kl_coef = next_kl_coef(self.config, experience)
        return experience

    def episodes(self, prompts: PromptBatch) -> Episodes:
        """One episode for each of this rank's prompts: a response, or a conversation with the environment. A collective
        under ZeRO-3 or with an environment.
        """
        if self.environment is None:
            return Episodes.of_one_turn(prompts, self.sample(prompts))
        given = dict(sampler=self.sampler, tokenizer=self.tokenizer, max_turns=self.config.rollout.max_turns)
        return played_episodes(prompts, self._keys(prompts), self.environment, **given)

    def sample(self, prompts: PromptBatch) -> Responses:
        """One response to each of this rank's prompts, drawn with this iteration's noise. A collective under ZeRO-3."""
        return self.sampler.responses(prompts.tokens, self._keys(prompts))

    def _keys(self, prompts: PromptBatch) -> list[tuple[int, ...]]:
        samples = self.config.rollout.samples_per_prompt
        return [
            (self.config.seed, self.progress.iteration, prompt_id, row % samples)
            for row, prompt_id in enumerate(prompts.ids)
        ]

    def shaped(self, scored: Scored, sequences: Sequences) -> Tensor:
        """(B,) what the scores are in the rewards: normalised, clipped, less the penalties on length."""
        settings, scores = self.config.reward, scored.scores
        if settings.running_normalisation:
            counted = ~scored.failed & scores.isfinite()  # one NaN would stay in the mean for the rest of the run
            self.progress.scores = self.progress.scores.with_more(scores[counted])
            scores = (scores - self.progress.scores.mean) / self.progress.scores.std
        if settings.clip is not None:
            scores = scores.clamp(-settings.clip, settings.clip)
        return scores - length_penalties(
            sequences.lengths - sequences.prompt_lengths,  # of an episode, the user's turns too: it ends by them all
            ended(sequences, self.eos_token_ids),
            missing_eos_penalty=settings.missing_eos_penalty,
            overlong_penalty=settings.overlong_penalty,
            overlong_tokens=settings.overlong_tokens,
            max_response_tokens=self.config.rollout.max_response_tokens,
        )

    def train_on(self, experience: Experience, stop_asked: Callable[[], bool] = lambda: False) -> bool:
        """All epochs over one iteration's responses, in minibatches drawn from all ranks' responses together.

        Args:
            stop_asked: asked before every step; a collective.

        Returns:
            False when it was stopped before the last step. `progress` says where, and calling it again goes on there.
        """
        rng = torch.Generator().manual_seed(self.config.seed + 1_000_003 * self.progress.iteration)
        done = self.progress.minibatches
        if done == 0:
            self.steps = []
        with self._timed("train"):
            for _ in range(self.config.ppo_epochs):
                for minibatch in experience.minibatches(self.config.minibatch_size, rng):
                    if done > 0:
                        done -= 1
                        continue
                    if stop_asked():
                        return False
                    self.train_rlhf(minibatch)
                    self.progress.minibatches += 1
                if done == 0 and self._far_enough():
                    break
        self.progress.penalty_coef = next_penalty_coef(self.config, self.progress.penalty_coef, self.steps)
        self.progress.minibatches = 0
        return True

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """One optimizer step of the actor and one of the critic on these responses: on all ranks, or on none.

        A collective: every rank passes the same experience and works on its share. Losses are means over all response
        tokens of the experience, however these are cut into micro-batches and ranks.

        Returns:
            (actor_loss, critic_loss), means over the whole experience; NaN when the step was skipped because
            something was not finite. Without a critic its loss is 0.

        Raises:
            RuntimeError: `max_skipped_steps` steps in a row were skipped.
        """
        count = experience.sequences.num_response_tokens
        if count == 0 or not experience.is_finite:
            return self._skip("no response tokens" if count == 0 else experience.not_finite)
        metrics = self.update.step(experience, penalty_coef=self.progress.penalty_coef)
        if metrics is None:
            cause = "a loss or a gradient that is not finite"
            self._quarantine(experience, {row: [] for row in range(len(experience))}, cause)
            return self._skip(cause)
        self.progress.skipped_in_a_row = 0
        self.steps.append(metrics)
        return metrics["loss/policy"], metrics["loss/value"]

    def metrics(self, experience: Experience) -> dict[str, float]:
        """The iteration's, under the names of `engine.tracking`. A collective."""
        response_tokens = experience.sequences.num_response_tokens
        return {
            **experience_metrics(experience, eos_token_ids=self.eos_token_ids),
            **step_metrics(self.steps, left_out=self.update.left_out),
            "score/failed": self.unscored,
            "skipped/steps": self.progress.skipped_steps,
            **{f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()},
            "speed/response_tokens_per_s": response_tokens / sum(self.seconds.values()),
            "memory/peak_gib": comm.max_over_ranks(comm.peak_memory_gib()),
            **({} if self.planned_gib is None else {"memory/planned_gib": self.planned_gib}),
        }

    def _far_enough(self) -> bool:
        """Whether the last step saw the actor further from the policy that sampled than `target_kl` allows."""
        target = self.config.target_kl
        return target is not None and bool(self.steps) and self.steps[-1]["policy/approx_kl"] > target

    def _begin_iteration(self) -> None:
        self.progress.iteration += 1
        self.progress.minibatches = self.drawn = 0
        self.steps = []

    def _quarantine(self, experience: Experience, rows: dict[int, list[str]], cause: str) -> None:
        kept = quarantine_rows(experience, rows, self.tokenizer)
        self.quarantined += [{"iteration": self.progress.iteration, "cause": cause, **row} for row in kept]

    def _tell(self, metrics: dict[str, float], tracker: Tracker) -> None:
        """What looks wrong in the iteration's numbers, once in a run; after the first iteration, how the plan fared."""
        if comm.is_main() and not self.compared and self.planned_gib is not None:
            print(planned_and_measured(metrics, on_gpu=comm.device().type == "cuda"), flush=True)
        self.compared = True
        given = dict(
            dtype=getattr(torch, self.rlhf_engine.dtype),
            max_response_tokens=self.config.rollout.max_response_tokens,
        )
        for name, sentence in signs_of_trouble(metrics, self.steps, **given).items():
            if name not in self.told:
                self.told.append(name)
                tracker.warn(self.progress.iteration, name, sentence)

    def _skip(self, cause: str) -> tuple[float, float]:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        said = f"iteration {self.progress.iteration}: step skipped on all ranks, {cause}"
        if comm.is_main():
            print(said, flush=True)
        if self.progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise RuntimeError(f"{said}; {self.progress.skipped_in_a_row} in a row, the run stops.")
        return float("nan"), float("nan")

    def _samples(self, prompts: PromptBatch, episodes: Episodes, experience: Experience) -> list[dict[str, Any]]:
        """A few of rank 0's rows, which come first in the experience."""
        few = min(self.config.tracking.samples_per_iteration, len(prompts)) if comm.is_main() else 0
        responses, conversations = episodes.drawn.tokens, episodes.conversations
        first = (each and each[:few] for each in (prompts.prompts, responses, conversations))
        texts = self.scoring.texts_of_episodes(*first)
        rows = sample_rows(experience, prompts.texts, responses, texts, conversations)
        return [{"iteration": self.progress.iteration, **row} for row in rows]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """A phase of an iteration, with the time that it takes."""
        started = perf_counter()
        with phase(name, self.progress.iteration, self.on_phase):
            yield
        self.seconds[name] = perf_counter() - started
