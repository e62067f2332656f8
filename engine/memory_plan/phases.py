"""The most that a rank's device holds in each phase of a PPO run, and of what it consists.

The phases are those of `engine/trainers/ppo_trainer.py`; `load` is the building of the models before them. A phase has
several moments that could be its peak; the plan is the largest. What the process itself takes (CUDA's context, NCCL's
buffers, the allocator's gaps; on a CPU Python and its libraries) is not in it: that is what a margin is for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.config import PPOConfig
from engine.memory_plan.model_states import ModelStates
from engine.memory_plan.roles import Role

Parts = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """Its peak, and what there is at that moment, in bytes."""

    parts: Parts

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sizes:
    """Of the passes on one rank."""

    prompt_tokens: int
    response_tokens: int
    micro_batch_size: int
    rollout_rows: int  # decoded at the same time

    @classmethod
    def of(cls, config: PPOConfig, *, world_size: int) -> "Sizes":
        mine = -(-config.rollout_batch_size // world_size)
        return cls(
            prompt_tokens=config.data.max_prompt_tokens,
            response_tokens=config.rollout.max_response_tokens,
            micro_batch_size=config.micro_batch_size,
            rollout_rows=min(mine, config.rollout_micro_batch_size),
        )

    @property
    def tokens(self) -> int:
        """Of a full row."""
        return self.prompt_tokens + self.response_tokens


def phases(
    config: PPOConfig, roles: Iterable[Role], states: Mapping[str, ModelStates], sizes: Sizes
) -> dict[str, Phase]:
    """load, generate, score and train.

    Args:
        states: by role; of all roles.
    """
    by_name = {role.name: role for role in roles}
    resident = {
        "weights": sum(of.weights_bytes + of.persistent_bytes for of in states.values()),
        "optimizer": sum(of.optimizer_bytes for of in states.values()),
        "moving average": sum(of.average_bytes for of in states.values()),
        "gradients": sum(of.gradients_bytes for of in states.values() if of.resident_gradients),
        "gradient buckets": sum(of.buckets_bytes for of in states.values() if of.resident_buckets),
    }
    moments = {
        "load": _load(states),
        "generate": _generate(config, by_name["actor"], states["actor"], sizes),
        "score": _score(config, by_name, states, sizes),
        "train": _train(config, by_name, states, sizes),
    }
    found = {}
    for name, of_phase in moments.items():
        whole = [_added({} if name == "load" else resident, more) for more in of_phase]
        found[name] = max((Phase({part: b for part, b in parts.items() if b}) for parts in whole), key=_peak)
    return found


def _load(states: Mapping[str, ModelStates]) -> list[Parts]:
    """Each role while it is built, beside those built before it; without the moments, which the first step makes."""
    built, found = {"weights": 0}, []
    for of in states.values():
        own = {"weights": of.weights_bytes, "optimizer": of.optimizer_bytes - of.moments_bytes}
        found.append(_added(built, own, {"building a model": of.building_bytes}))
        more = {"moving average": of.average_bytes}
        more |= {"gradients": of.gradients_bytes * of.resident_gradients}
        built = _added(built, own, more, {"gradient buckets": of.buckets_bytes * of.resident_buckets})
    return [*found, built]


def _generate(config: PPOConfig, role: Role, of: ModelStates, sizes: Sizes) -> list[Parts]:
    """Reading the prompts, and decoding the last token of all responses."""
    model, rows, item = role.model.get_text_config(), sizes.rollout_rows, role.dtype.itemsize
    gathered = of.zero_stage == 3 and config.rollout.weights == "gathered"
    whole = {"weights made whole": (of.whole_bytes if gathered else of.live_bytes) - of.persistent_bytes}
    key_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    column = 2 * rows * width * item  # keys and values of one head and token in one layer
    cache = column * key_heads * sizes.tokens * model.num_hidden_layers
    one_layer = column * sizes.tokens * (model.num_attention_heads if key_heads < model.num_attention_heads else 0)
    at_once = min(rows, max(1, sizes.micro_batch_size * sizes.tokens // sizes.prompt_tokens))
    prefill = role.pass_peak(
        tokens=sizes.prompt_tokens,
        rows=at_once,
        trained=False,
        response_tokens=1,
        logits_chunk_tokens=config.logits_chunk_tokens,
    )
    drawing = rows * model.vocab_size * _bytes_per_logit(config)
    return [
        _added(
            whole, {"KV cache": cache + cache * at_once // rows * (at_once < rows), "activations": prefill.peak_bytes}
        ),
        _added(whole, {"KV cache": cache, "logits": drawing, "activations": one_layer}),
    ]


def _bytes_per_logit(config: PPOConfig) -> int:
    """Of what `engine.rollout.generation._draw` holds: fp32 logits, log-probabilities, probabilities and products, the
    fp64 sum; possible logits and their distribution where ids are left out, as unused rows of the embedding are.
    """
    rollout = config.rollout
    filtered = rollout.top_k > 0 or rollout.top_p < 1.0
    return 24 + 4 * (rollout.temperature != 1.0) + 12 + 24 * filtered


def _score(
    config: PPOConfig, roles: Mapping[str, Role], states: Mapping[str, ModelStates], sizes: Sizes
) -> list[Parts]:
    """Each model asked about one micro-batch: under ZeRO-3 whole where it is no larger than the actor, which is whole
    in the rollout, and layer by layer otherwise (`gathered_for_scoring`). The full KL asks actor and ref together.
    """
    most = states["actor"].whole_bytes if config.rollout.weights == "gathered" else 0
    held = {
        name: of.whole_bytes - of.persistent_bytes if of.zero_stage == 3 and of.whole_bytes <= most else _passing(of)
        for name, of in states.items()
    }
    together = held.get("ref", 0) if config.kl_estimator == "full" else 0
    return [
        _added(
            _activations(config, role, sizes, trained=False),
            {"weights made whole": held[name] + together * (name == "actor")},
        )
        for name, role in roles.items()
    ]


def _train(
    config: PPOConfig, roles: Mapping[str, Role], states: Mapping[str, ModelStates], sizes: Sizes
) -> list[Parts]:
    """Actor and critic in turn, in a backward pass and while its gradients are added up; then both stepped."""
    found, held = [], 0
    for name, role in roles.items():
        of = states[name]
        if not role.trained:
            continue
        held += of.gradients_bytes * (not of.resident_gradients)
        in_pass = {"gradients": held, "gradient buckets": of.buckets_bytes * (not of.resident_buckets)}
        passing = {"weights made whole": _passing(of)}
        if config.kl_placement == "loss" and name == "actor" and "ref" in states:
            passing = {"weights made whole": _passing(of) + _passing(states["ref"])}
        adding, activations = {"adding up gradients": of.adding_bytes}, _activations(config, role, sizes, trained=True)
        if of.adds_in_pass:
            found.append(_added(in_pass, passing, adding, activations))
            continue
        left = {"weights made whole": of.left_bytes - of.persistent_bytes}
        found += [_added(in_pass, passing, activations), _added(in_pass, left, adding)]
    found.append({"gradients": held, "stepping": max(of.stepping_bytes for of in states.values())})
    return found


def _activations(config: PPOConfig, role: Role, sizes: Sizes, *, trained: bool) -> Parts:
    """Of one micro-batch, the logits of a chunk of tokens among them."""
    asked = dict(trained=trained, logits_chunk_tokens=config.logits_chunk_tokens)
    full = config.kl_estimator == "full" and role.name == "actor" and (not trained or config.kl_placement == "loss")
    rows = [(sizes.tokens, sizes.micro_batch_size, sizes.response_tokens)]
    if trained and role.name == "actor" and config.pretraining is not None:
        longest = config.pretraining.data.max_length
        rows.append((longest, max(1, sizes.micro_batch_size * sizes.tokens // longest), longest - 1))
    peaks = [
        role.pass_peak(tokens=tokens, rows=count, response_tokens=responses, kl_full=full, **asked).peak_bytes
        for tokens, count, responses in rows
    ]
    return {"activations": max(peaks)}


def _passing(of: ModelStates) -> int:
    """Bytes of layers that are whole in a pass, beyond those that always are."""
    return of.live_bytes - of.persistent_bytes


def _added(*several: Parts) -> Parts:
    total: Parts = {}
    for parts in several:
        for name, size in parts.items():
            total[name] = total.get(name, 0) + int(size)
    return total


def _peak(phase: Phase) -> int:
    return phase.peak_bytes
