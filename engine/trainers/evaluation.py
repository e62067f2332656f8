"""The held-out prompts of a PPO run: what the actor answers before training, every so many iterations and at the end.

An evaluation is a function of the weights: responses are the likeliest, or drawn with noise that is always the same.
Training does not notice it: the generators of random numbers, the models' modes and all that an iteration moves on are
left as they were.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config import EvaluationConfig
from engine.data import PromptDataset
from engine.data.formatting import Messages
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.random_states import random_states_kept
from engine.models.modes import eval_mode
from engine.rollout.episodes import Episodes, played_episodes
from engine.rollout.experience import padded
from engine.rollout.measuring import measure, sequences_of_all_ranks
from engine.rollout.sampler import Sampler
from engine.rollout.score_functions import ScoreFunction, load_score_function, scores_of_function
from engine.tracking import Tracker
from engine.trainers.phases import phase
from engine.trainers.ppo_metrics import ended

if TYPE_CHECKING:
    from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An actor's responses to the held-out prompts, one entry per prompt and in their order; the same on every rank."""

    responses: list[str]
    scores: list[float | None]  # None: nobody could say, or it is not finite
    kl: list[float]  # to the ref, nats per response
    lengths: list[int]  # tokens
    metrics: dict[str, float]  # all but the win rate


class Evaluation:
    """Of a run with held-out prompts; of one without, it does nothing.

    Attributes:
        initial: what the actor answered before training.
    """

    def __init__(self, trainer: DeepSpeedPPOTrainer, held_out: PromptDataset | None):
        """
        Raises:
            ValueError: on every rank, when the run has `data.eval` and nobody gave its prompts, or the other way round;
                or when there is no such metric.
        """
        config = trainer.config
        if (held_out is None) != (config.data.eval is None):
            raise ValueError(
                "args.data.eval and the trainer's held-out prompts go together: DeepSpeedPPOTrainer(rlhf_engine, args, "
                "held_out=engine.data.create_eval_dataset(args, tokenizer, train_phase=3)) evaluates."
            )
        self.trainer, self.held_out, self.settings = trainer, held_out, config.evaluation
        self.initial: Answers | None = None
        if held_out is None:
            return
        self.prompts = held_out.batch(torch.tensor(held_out.kept).tensor_split(comm.world_size())[comm.rank()].tolist())
        with comm.same_error_everywhere():
            self.functions = load_metrics(config.evaluation)
        self.sampler = Sampler(
            trainer.actor,
            trainer.tokenizer,
            config,
            eos_token_ids=trainer.eos_token_ids,
            temperature=config.evaluation.temperature,
            # As many as this rank decodes in training: memory that is known to be there.
            micro_batch_size=min(config.rollout_micro_batch_size, -(-config.rollout_batch_size // comm.world_size())),
        )

    def begin(self, tracker: Tracker) -> None:
        """Ask the initial actor, where that has not been done. A collective.

        Raises:
            ValueError: on every rank, when it is too late for that.
        """
        if self.held_out is None:
            return
        if self.initial is None:
            if self.trainer.progress.iteration > 0:
                raise ValueError(
                    "The run began without an evaluation, so that there are no initial responses to compare with: "
                    "leave data.eval out, or begin anew."
                )
            self.initial = self.answers()
        if self.trainer.iterations_done == 0:  # a run that is gone on with from here begins its files anew
            self._write(0, self.initial, tracker)

    def after(self, iteration: int, tracker: Tracker, *, last: bool) -> None:
        """Evaluate if it is time to. A collective."""
        if self.held_out is not None and (last or iteration % self.settings.every == 0):
            self._write(iteration, self.answers(), tracker)

    def snapshot(self) -> dict[str, Any] | None:
        """What a run that goes on has to know, as JSON has it."""
        return None if self.initial is None else asdict(self.initial)

    def put_back(self, kept: dict[str, Any] | None) -> None:
        """Take up what `snapshot` said."""
        self.initial = None if kept is None else Answers(**kept)

    def answers(self) -> Answers:
        """What the actor answers now. A collective; ranks may have different numbers of prompts, or none.

        Raises:
            ValueError: on every rank, when a source of scores, a metric or an environment fails on any.
        """
        trainer = self.trainer
        with (
            phase("evaluate", trainer.progress.iteration, trainer.on_phase),
            random_states_kept(),
            eval_mode(trainer.actor.module),
        ):
            episodes = self._episodes()
            sequences, tokens = sequences_of_all_ranks(episodes.sequences), episodes.drawn.tokens
            scored = trainer.scoring.scores(self.prompts, tokens, sequences, episodes.conversations)
            kl = self._kl(sequences)
            texts = trainer.scoring.texts_of_episodes(self.prompts.prompts, tokens, episodes.conversations)
            of_users = self._of_users(texts, episodes.conversations)
        known = scored.scores.isfinite() & ~scored.failed
        scores, lengths = scored.scores[known], sequences.response_lengths
        return Answers(
            responses=[text for of_rank in comm.gathered_objects(texts) for text in of_rank],
            scores=[score if is_known else None for score, is_known in zip(scored.scores.tolist(), known, strict=True)],
            kl=kl.tolist(),
            lengths=lengths.tolist(),
            metrics={
                "eval/score_mean": scores.mean().item(),
                "eval/score_std": scores.std(correction=0).item(),
                "eval/kl_ref_mean": kl.mean().item(),
                "eval/length_mean": lengths.float().mean().item(),
                "eval/eos_fraction": ended(sequences, trainer.eos_token_ids).float().mean().item(),
                **of_users,
            },
        )

    def _write(self, iteration: int, answers: Answers, tracker: Tracker) -> None:
        compared = {"eval/win_rate": win_rate(answers.scores, self.initial.scores)}
        asked = [self.held_out.texts[row] for row in self.held_out.kept[: self.settings.samples]]
        rows = [
            {
                "prompt": prompt,
                "response": answers.responses[row],
                "score": answers.scores[row],
                "kl": answers.kl[row],
                "length": answers.lengths[row],
                "initial_response": self.initial.responses[row],
                "initial_score": self.initial.scores[row],
            }
            for row, prompt in enumerate(asked)
        ]
        tracker.evaluation(iteration, answers.metrics | compared, rows)

    def _episodes(self) -> Episodes:
        """One for each of this rank's prompts, with noise that is of the prompt alone."""
        config, trainer, prompts = self.trainer.config, self.trainer, self.prompts
        keys = [(config.seed, "evaluation", prompt_id) for prompt_id in prompts.ids]
        if trainer.environment is None:
            return Episodes.of_one_turn(prompts, self.sampler.responses(prompts.tokens, keys))
        given = dict(sampler=self.sampler, tokenizer=trainer.tokenizer, max_turns=config.rollout.max_turns)
        return played_episodes(prompts, keys, trainer.environment, **given)

    def _kl(self, sequences: Sequences) -> Tensor:
        """(B,) to the ref, in nats per response, as in training."""
        config, trainer = self.trainer.config, self.trainer
        measured = measure(
            sequences,
            None,
            recomputed=True,
            actor=trainer.actor,
            ref=trainer.ref,
            critic=None,
            kl_estimator=config.kl_estimator,
            temperature=config.rollout.temperature,
            chunk_tokens=config.logits_chunk_tokens,
            token_budget=config.micro_batch_tokens,
            gather_weights=config.rollout.weights == "gathered",
        )
        return padded(measured.kl, sequences.response_lengths).sum(1)

    def _of_users(self, texts: list[str], conversations: list[Messages] | None) -> dict[str, float]:
        """The users' metrics: means over the responses of all ranks."""
        prompts, found = self.prompts, {}
        if conversations is not None:
            prompts = replace(prompts, columns=prompts.columns | {"conversations": conversations})
        for name, function in self.functions.items():
            with comm.same_error_everywhere():
                given = (function, prompts.texts, texts, prompts.columns)
                mine = scores_of_function(
                    *given, timeout_s=self.trainer.config.reward.timeout_s, kind="evaluation metric"
                )
            found[f"eval/{name}"] = comm.concatenated(mine.to(comm.device())).mean().item()
        return found


def load_metrics(settings: EvaluationConfig) -> dict[str, ScoreFunction]:
    """The users' functions, by their names.

    Raises:
        ValueError: there is no such function.
    """
    return {name: load_score_function(spec, setting="evaluation.metrics") for name, spec in settings.functions.items()}


def win_rate(scores: list[float | None], initial_scores: list[float | None]) -> float:
    """The share of prompts whose response scores above the initial one, ties half; NaN where no prompt has both scores.

    A prompt with a score that nobody knows is left out.
    """
    pairs = [pair for pair in zip(scores, initial_scores, strict=True) if None not in pair]
    return sum((now > then) + 0.5 * (now == then) for now, then in pairs) / len(pairs) if pairs else math.nan
