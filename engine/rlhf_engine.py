"""The four models of RLHF, each under its own ZeRO strategy."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from engine.config import FrozenRoleConfig, PPOConfig, TrainedRoleConfig, resolved_dtype
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.checkpoint import Trained
from engine.distributed.export import export_critic_of_trunk, export_huggingface
from engine.distributed.initialize import (
    Engine,
    Switched,
    WithoutAdapter,
    WithRewardAdapter,
    frozen_engine,
    parameter_bytes,
    trained_engine,
)
from engine.distributed.moving_average import MovingAverage
from engine.models.language_model import load_language_model
from engine.models.loading import load_tokenizer, read_alike, vocabulary_size
from engine.models.lora import with_adapter
from engine.models.scalar_head import load_critic, load_reward_model, scoring_pad_token_id
from engine.models.shared_trunk import load_shared_trunk
from engine.rollout.measuring import reward_model_scores, sequences_of_all_ranks
from engine.rollout.self_check import check_language_model


class DeepSpeedRLHFEngine:
    """Builds and owns actor, ref, critic and reward.

    Attributes:
        actor, critic: trained engines; the critic is None where advantages need none (`args.advantage_estimator`), and
            where it is a head on the actor (`args.shared_trunk`).
        actor_ema: the moving average of the actor's weights; None without `args.ema_decay`.
        ref: frozen; the actor's starting point unless the config names another: a model of its own, or the actor with
            its adapter switched off.
        reward: frozen; a model of its own, or the actor with another adapter; None when scores come from elsewhere.
        tokenizer: the actor's.
        reward_tokenizer: the reward model's.
        dtype: of all weights.
    """

    actor: Engine
    actor_ema: MovingAverage | None
    ref: Engine | Switched
    critic: Engine | None
    reward: Engine | Switched | None

    def __init__(
        self,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        num_total_iters: int,
        args: PPOConfig,
    ):
        """A collective: all ranks build the same models in the same order.

        Args:
            actor_model_name_or_path: a causal language model.
            critic_model_name_or_path: a reward model, or a language model that gets a fresh scalar head.
            num_total_iters: PPO iterations of the run, each of `args.steps_per_iteration` optimizer steps; with them
                the learning-rate schedules end. (The short last batch of an epoch takes fewer.)

        Raises:
            ValueError: sizes that the ranks cannot share out, `rollout.logprobs: drawn` in 16 bits, a model that is not
                there or not of its kind, or one whose vocabulary is not the actor's.
        """
        args.check_world_size(comm.world_size())
        if args.zero_stage == "auto":
            raise ValueError("zero_stage=auto: choose first, with engine.memory_plan.with_stages_chosen(args).")
        self.args, self.tokenizer = args, tokenizer
        self.dtype = resolved_dtype(args.dtype, on_gpu=comm.device().type == "cuda")
        if args.rollout.logprobs == "drawn" and self.dtype != "float32":
            raise ValueError(
                f"rollout.logprobs=drawn is for float32: in {self.dtype} decoding and training round too differently. "
                f"Leave it out, or set --dtype float32."
            )
        self.total_steps = num_total_iters * args.steps_per_iteration
        torch_dtype = getattr(torch, self.dtype)

        with comm.same_error_everywhere():
            if args.has_critic and not args.shared_trunk:
                self._check_vocabulary("critic", critic_model_name_or_path)
            if args.ref.model_name_or_path is not None:
                self._check_vocabulary("ref", args.ref.model_name_or_path)
        if args.shared_trunk:
            self._build_trunk(actor_model_name_or_path, torch_dtype)
        else:
            self._build_models(actor_model_name_or_path, critic_model_name_or_path, torch_dtype)
        self.actor_ema = None if args.ema_decay is None else MovingAverage(self.actor, decay=args.ema_decay)
        self._check_sizes()
        check_language_model(self.actor, role="actor")
        if args.ref.model_name_or_path is not None:
            check_language_model(self.ref, role="ref")

    @property
    def reward_reads_text(self) -> bool:
        """Whether the reward model has a tokenizer or a chat template of its own, so that token ids say nothing to it
        and responses are written out for it."""
        if self.reward_tokenizer is None:
            return False
        same_template = self.reward_tokenizer.chat_template == self.tokenizer.chat_template
        return not (same_template and read_alike(self.reward_tokenizer, self.tokenizer))

    @property
    def trained(self) -> Trained:
        """What a checkpoint holds."""
        engines = {role: engine for role in ("actor", "critic") if (engine := getattr(self, role)) is not None}
        return Trained(engines=engines, averages={} if self.actor_ema is None else {"actor_ema": self.actor_ema})

    def export(self, output_dir: Path) -> list[str]:
        """Write what has been trained as Hugging Face folders, `actor`, `actor_ema` and `critic`: those there are.

        A collective.

        Returns:
            Their names.
        """
        form, average, written = self.args.actor.export_form, self.actor_ema, ["actor"]
        export_huggingface(self.actor, output_dir / "actor", self.tokenizer, form=form)
        if average is not None:
            export_huggingface(self.actor, output_dir / "actor_ema", self.tokenizer, form=form, average=average)
            written.append("actor_ema")
        if self.critic is not None:
            export_huggingface(self.critic, output_dir / "critic", self.tokenizer, form=self.args.critic.export_form)
        elif self.actor.module.has_value_head:
            export_critic_of_trunk(self.actor, output_dir / "critic", self.tokenizer)
        return [*written, *(("critic",) if self.args.has_critic else ())]

    def parameter_bytes(self) -> dict[str, int]:
        """What each role adds to the weights in memory, sharded or not: nothing where it is another role's model. A
        shared trunk's is the actor's.
        """
        engines = {role: getattr(self, role) for role in ("actor", "ref", "critic", "reward")}
        return {role: parameter_bytes(e) if isinstance(e, Engine) else 0 for role, e in engines.items()}

    def reward_scores(self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        """The reward model's scores of this rank's responses, for those who hold the loop themselves. A collective.

        Args:
            queries, responses: token ids of the actor's tokenizer, lists or 1-D tensors; ranks may hold different
                numbers of them.

        Raises:
            ValueError: on every rank, when there is no reward model, it does not read the actor's token ids, or what
                any rank gives is no rows of them (see `given`).
        """
        if self.reward is None or self.reward_reads_text:
            why = "there is none" if self.reward is None else "it has a tokenizer or chat template of its own"
            raise ValueError(f"reward_scores() asks the reward model about token ids, and {why}.")
        with comm.same_error_everywhere():
            mine = self.given(queries, responses, caller="reward_scores()")
        scores = reward_model_scores(
            sequences_of_all_ranks(mine), self.reward, token_budget=self.args.micro_batch_tokens
        )
        before = comm.concatenated(torch.tensor([len(mine)], device=comm.device())).cpu()[: comm.rank()].sum()
        return scores[int(before) : int(before) + len(mine)].tolist()

    def given(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]] | None, *, caller: str
    ) -> Sequences:
        """What somebody who holds the loop hands over; without `responses`, queries that leave room for one.

        Raises:
            ValueError: the lists do not fit together, a sequence is too long, or a token id is none.
        """
        longest, said = self.args.data.max_prompt_tokens, "data.max_prompt_tokens"
        if responses is None:
            responses = [[]] * len(queries)
        else:
            longest, said = longest + self.args.rollout.max_response_tokens, f"{said} + rollout.max_response_tokens"
        if len(queries) != len(responses):
            raise ValueError(f"{caller} was given {len(queries)} queries and {len(responses)} responses.")
        sequences = Sequences.of(*([[int(token) for token in row] for row in rows] for rows in (queries, responses)))
        if len(sequences) and int(sequences.lengths.max()) > longest:
            raise ValueError(
                f"{caller} was given a sequence of {int(sequences.lengths.max())} tokens; {said} = {longest}."
            )
        known = vocabulary_size(self.tokenizer)
        if len(sequences) and not (int(sequences.tokens.min()) >= 0 and int(sequences.tokens.max()) < known):
            raise ValueError(f"{caller} was given a token id outside the tokenizer's 0 to {known - 1}.")
        return sequences

    def _build_models(self, actor: str, critic: str, dtype: torch.dtype) -> None:
        """A model for every role, but for a ref that is the actor without its adapter."""
        args = self.args
        scalar = dict(dtype=dtype, pad_token_id=scoring_pad_token_id(self.tokenizer))
        self.actor = self._trained("actor", args.actor, partial(load_language_model, actor, dtype=dtype))
        if args.ref_is_the_actor:
            self.ref = WithoutAdapter(self.actor)
        else:
            build_ref = partial(load_language_model, args.ref.model_name_or_path or actor, dtype=dtype)
            self.ref = self._frozen("ref", args.ref, build_ref)
        self.critic = None
        if args.has_critic:
            self.critic = self._trained("critic", args.critic, partial(load_critic, critic, seed=args.seed, **scalar))
        self.reward, self.reward_tokenizer = None, None
        if args.reward.model_name_or_path is not None:
            self.reward_tokenizer = load_tokenizer(args.reward.model_name_or_path)
            build_reward = partial(load_reward_model, args.reward.model_name_or_path, **scalar)
            self.reward = self._frozen("reward", args.reward, build_reward)

    def _build_trunk(self, actor: str, dtype: torch.dtype) -> None:
        """One model for all roles."""
        args, reward = self.args, self.args.reward.model_name_or_path
        build = partial(
            load_shared_trunk,
            actor,
            dtype=dtype,
            adapter=args.actor.adapter,
            reward_adapter=reward,
            with_value_head=args.has_critic,
            seed=args.seed,
            quantization=args.actor.quantization,
        )
        self.actor = self._trained_engine("actor", args.actor, build, learning_rate=args.critic.learning_rate)
        self.ref, self.critic = WithoutAdapter(self.actor), None
        self.reward = None if reward is None else WithRewardAdapter(self.actor)
        self.reward_tokenizer = None if reward is None else load_tokenizer(reward, is_adapter=True)

    def _trained(self, role: Literal["actor", "critic"], config: TrainedRoleConfig, build) -> Engine:
        build = partial(build, quantization=config.quantization)
        if config.has_adapter:
            build = partial(with_adapter, build, seed=self.args.seed, **config.adapter)
        return self._trained_engine(role, config, build, learning_rate=config.learning_rate)

    def _trained_engine(self, role: str, config: TrainedRoleConfig, build, *, learning_rate: float) -> Engine:
        """`learning_rate` is of all but an adapter."""
        return trained_engine(
            build,
            ds_config=self.args.ds_config_of(role),
            dtype=self.dtype,
            learning_rate=learning_rate,
            adapter_learning_rate=config.adapter_learning_rate,
            lr_scheduler=config.lr_scheduler,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            max_grad_norm=config.max_grad_norm,
            gradient_checkpointing=config.gradient_checkpointing,
        )

    def _frozen(self, role: Literal["ref", "reward"], config: FrozenRoleConfig, build) -> Engine:
        build = partial(build, quantization=config.quantization)
        return frozen_engine(build, ds_config=self.args.ds_config_of(role), dtype=self.dtype)

    def _check_vocabulary(self, role: str, model_name_or_path: str) -> None:
        """All models read the actor's token ids: another vocabulary would be read as other text."""
        tokenizer = load_tokenizer(model_name_or_path)
        theirs, ours = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        if theirs == ours and not read_alike(tokenizer, self.tokenizer):
            raise ValueError(
                f"The {role}'s tokenizer ({model_name_or_path}) has the actor's vocabulary, and begins or ends a text "
                f"otherwise (its end of sequence: {tokenizer.eos_token!r}, the actor's: {self.tokenizer.eos_token!r}). "
                f"Name a {role} trained with the actor's tokenizer: --{role}.model_name_or_path."
            )
        if theirs != ours:
            different = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
            raise ValueError(
                f"The {role}'s vocabulary ({model_name_or_path}, {len(theirs)} entries) is not the actor's "
                f"({len(ours)} entries): {len(different)} tokens differ, {different[0]!r} among them. "
                f"Name a {role} trained with the actor's tokenizer: --{role}.model_name_or_path."
            )

    def _check_sizes(self) -> None:
        """No token id and no position may lie outside a model's embeddings."""
        vocabulary = vocabulary_size(self.tokenizer)
        longest = self.args.data.max_prompt_tokens + self.args.rollout.max_response_tokens
        for role in ("actor", "ref", "critic", "reward"):
            engine = getattr(self, role)
            if engine is None or (role == "reward" and self.reward_reads_text):
                continue
            model_config = engine.module.model.config.get_text_config()
            if model_config.vocab_size < vocabulary:
                raise ValueError(
                    f"The {role} embeds {model_config.vocab_size} tokens and the tokenizer has {vocabulary}: some ids "
                    f"would be out of range."
                )
            positions = getattr(model_config, "max_position_embeddings", math.inf)  # ALiBi models have no limit
            if role == "ref" and self.args.kl_estimator == "full":
                actors = self.actor.module.model.config.get_text_config().vocab_size
                if model_config.vocab_size != actors:
                    raise ValueError(
                        f"kl_estimator=full compares whole vocabularies: the actor's head has {actors} rows, the ref's "
                        f"{model_config.vocab_size}. Take k1, k2 or k3."
                    )
            if positions < longest:
                raise ValueError(
                    f"The {role} was made for sequences of {positions} tokens, and "
                    f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}. Lower one of them."
                )
            if role == "actor" and self.args.pretraining and positions < self.args.pretraining.data.max_length:
                raise ValueError(
                    f"The actor was made for sequences of {positions} tokens, and pretraining.data.max_length = "
                    f"{self.args.pretraining.data.max_length}. Lower it."
                )
