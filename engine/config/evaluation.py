"""How a PPO run looks at held-out prompts."""

from collections import Counter
from dataclasses import dataclass, field

from engine.config.checks import at_least

# Of every evaluation, as `eval/...`.
OWN_METRICS = ("score_mean", "score_std", "win_rate", "kl_ref_mean", "length_mean", "eos_fraction")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The actor's answers to the prompts of `data.eval`, before training, every so many iterations and at the end.
    Training does not notice: with evaluation or without, its numbers are the same.

    Attributes:
        every: iterations between evaluations; there is one before training and one at the end, too.
        num_prompts: only the first so many.
        samples: the first so many responses are kept, in `evaluation_samples.jsonl`.
        temperature: 0 takes the likeliest tokens. Above 0 they are drawn, with the rollout's filters and always the
            same noise. The KL is of the response that was written, at `rollout.temperature`.
        metrics: `module:function` or `file.py:function`, called as `reward.function` is and asked for one number per
            response; their means are `eval/<function>`.
    """

    every: int = 10
    num_prompts: int = 128
    samples: int = 8
    temperature: float = 0.0
    metrics: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, least in (("every", 1), ("num_prompts", 1), ("samples", 0), ("temperature", 0)):
            at_least(f"evaluation.{name}", getattr(self, name), least)
        for spec in self.metrics:
            if spec.count(":") != 1:
                raise ValueError(
                    f"evaluation.metrics: {spec!r} is not of the form module:function or file.py:function."
                )
        for name, times in Counter((*OWN_METRICS, *(spec.split(":")[1] for spec in self.metrics))).items():
            if times > 1:
                raise ValueError(
                    f"evaluation.metrics={self.metrics}: two metrics would be called eval/{name}; rename the function."
                )

    @property
    def functions(self) -> dict[str, str]:
        """What each of `metrics` is called -> where it is."""
        return {spec.split(":")[1]: spec for spec in self.metrics}
