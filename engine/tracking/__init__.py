"""Metrics and samples of a run, from global rank 0: a progress line, `metrics.jsonl`, `samples.jsonl` and W&B.

The names every PPO iteration reports:

    score/mean score/std score/failed          of whole responses; how many nobody could score
    reward/kl_penalty kl/ref_mean kl/coef      the penalty and the KL to the ref per response, and the coefficient
    loss/policy loss/value                     means over the response tokens of all ranks
    policy/clip_fraction policy/approx_kl policy/ratio_max policy/first_log_ratio_max policy/entropy
    value/explained_variance value/clip_fraction
    response/length_mean response/eos_fraction
    grad_norm/actor grad_norm/critic lr/actor lr/critic
    skipped/steps                              since the run started
    time/generate_s time/score_s time/train_s speed/response_tokens_per_s memory/peak_gib
    memory/planned_gib                         where the run has a memory plan
"""

from engine.tracking.tracker import Tracker

__all__ = ["Tracker"]
