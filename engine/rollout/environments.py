"""The other side of a conversation: a class of the user's, one object of it for each episode.

class Teacher:
    def __init__(self, answer, **columns): ...            # the columns of the prompt's row; none are needed
    def reply(self, conversation) -> str | None: ...      # what the user says next; None ends the episode
"""

import inspect
from typing import Any

from engine.data.formatting import Messages
from engine.rollout.users_code import named, place_of


def load_environment(spec: str | None) -> type | None:
    """The class that `module:class` names; None where nothing is named.

    Raises:
        ValueError: there is no such module or class, or it has no method `reply`.
    """
    if spec is None:
        return None
    environment = named(spec, setting="rollout.environment")
    module_name, class_name = spec.split(":")
    if not isinstance(environment, type):
        raise ValueError(f"rollout.environment={spec}: {module_name} has no class {class_name}.")
    if not callable(getattr(environment, "reply", None)):
        raise ValueError(f"rollout.environment={spec}: {class_name} has no method reply(conversation).")
    return environment


def new_environment(environment: type, columns: dict[str, Any]) -> Any:
    """An object for one episode, made with those of the row's columns that the class has arguments for: with all of
    them where it takes `**columns`, with none where it takes nothing.

    Raises:
        ValueError: it wants another argument, or raised.
    """
    name, signature = environment.__qualname__, inspect.signature(environment)
    if not any(argument.kind is argument.VAR_KEYWORD for argument in signature.parameters.values()):
        columns = {column: cell for column, cell in columns.items() if column in signature.parameters}
    try:
        signature.bind(**columns)
    except TypeError as error:
        raise ValueError(
            f"the environment {name} is made with the dataset's columns, which do not fit its arguments: {error}."
        ) from error
    try:
        return environment(**columns)
    except Exception as error:  # the user's code: whatever it raises is shown with the class's name
        place = place_of(error, caller=__file__)
        raise ValueError(f"the environment {name} raised {type(error).__name__}: {error}{place}") from error


def reply_of(environment: Any, conversation: Messages) -> str | None:
    """What the user says next; None when the episode is over.

    Args:
        conversation: ends with the actor's turn. The environment is given a copy.

    Raises:
        ValueError: the environment raised, or returned something else.
    """
    name = type(environment).__qualname__
    try:
        reply = environment.reply([dict(message) for message in conversation])
    except Exception as error:  # as in new_environment
        place = place_of(error, caller=__file__)
        raise ValueError(f"the environment {name} raised {type(error).__name__}: {error}{place}") from error
    if reply is not None and not isinstance(reply, str):
        raise ValueError(
            f"the environment {name} replied {str(reply)[:80]!r}, a {type(reply).__name__}: reply(conversation) "
            f"returns what the user says next, a string, or None to end the episode."
        )
    return reply
