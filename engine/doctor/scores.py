"""Checks of the user's own code and services: what scores responses, and what replies to them."""

from typing import Any

from engine.doctor.data import chat_template as check_template
from engine.doctor.data import prompts_and_columns
from engine.doctor.findings import Finding, failed, ok, warning, with_remedy
from engine.doctor.subject import Subject

SERVICE_S, FUNCTION_S = 10, 60  # that an answer may take


@with_remedy("Correct the function, or its name: --reward.function module:function.")
def score_function(subject: Subject) -> Finding | None:
    """It is found, and scores the first two rows."""
    from engine.rollout.score_functions import load_score_function, scores_of_function

    if not (subject.is_ppo and subject.config.reward.function):
        return None
    name = subject.config.reward.function
    function = load_score_function(name)
    scores = scores_of_function(function, *_asked(subject), timeout_s=subject.config.reward.timeout_s or FUNCTION_S)
    return _told(name, scores)


@with_remedy("Correct the function, or its name: --evaluation.metrics.")
def evaluation_metrics(subject: Subject) -> Finding | None:
    """Each is found."""
    from engine.rollout.score_functions import load_score_function

    if not (subject.is_ppo and subject.config.evaluation.metrics):
        return None
    for spec in subject.config.evaluation.metrics:
        load_score_function(spec, setting="evaluation.metrics")
    return ok(", ".join(subject.config.evaluation.metrics))


@with_remedy("Start it (python launch/serve_scores.py serves a function), or correct --reward.url.")
def score_service(subject: Subject) -> Finding | None:
    """It answers, with a score for each of the first two rows."""
    from engine.config.secrets import without_secrets
    from engine.rollout.score_service import scores_of_service

    if not (subject.is_ppo and subject.config.reward.url):
        return None
    url = subject.config.reward.url
    return _told(without_secrets(url), scores_of_service(url, *_asked(subject), timeout_s=SERVICE_S, retries=0))


@with_remedy("Correct the class, or its name: --rollout.environment module:class.")
def environment(subject: Subject) -> Finding | None:
    """It is found, takes the columns of the first row, and replies to an answer; the prompts are conversations."""
    from engine.data.formatting import encode_reply
    from engine.rollout.environments import load_environment, new_environment, reply_of

    if not (subject.is_ppo and subject.config.rollout.environment):
        return None
    made = load_environment(subject.config.rollout.environment)
    prompts, columns = prompts_and_columns(subject, 1)
    if isinstance(prompts[0], str):
        return failed(
            "the prompts are text, and with rollout.environment they have to be conversations.",
            "Set --data.prompt_format chat, or give lists of messages.",
        )
    other_side = new_environment(made, {name: cells[0] for name, cells in columns.items()})
    answered, tokenizer = [*prompts[0], {"role": "assistant", "content": "yes"}], subject.tokenizer("actor")
    encode_reply(answered, "no", tokenizer, [tokenizer.eos_token_id])  # the template can go on after an answer
    reply = reply_of(other_side, answered)
    return ok(f"{subject.config.rollout.environment} replies {str(reply)[:40]!r} to 'yes'")


def _asked(subject: Subject) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Prompts as the model sees them, made-up responses, columns."""
    from engine.data.formatting import render

    check_template(subject)
    prompts, columns, tokenizer = *prompts_and_columns(subject, 2), subject.tokenizer("actor")
    responses = ["yes", "no"][: len(prompts)]
    if subject.config.rollout.environment is not None:
        pairs = zip(prompts, responses, strict=True)
        talks = [
            [*prompt, {"role": "assistant", "content": said}] for prompt, said in pairs if isinstance(prompt, list)
        ]
        columns |= {"conversations": talks}
    return [render(prompt, tokenizer) for prompt in prompts], responses, columns


def _told(name: str, scores) -> Finding:
    if not scores.isfinite().all():
        said = f"{name} scores the first rows {scores.tolist()}: a step with such a score is skipped."
        return warning(said, "Return a finite number for every response.")
    return ok(f"{name} scores the responses 'yes' and 'no' to the first rows {scores.tolist()}")


CHECKS = [score_function, evaluation_metrics, score_service, environment]
