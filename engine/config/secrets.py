"""What of a setting may be written down."""

import os
import re
from typing import Any

# What the query of an address may show: the values of these, and names of the environment.
PLAIN = {"model", "version", "api-version", "n", "format", "task", "name", "language"}
NAME = re.compile(r"\$\w+|\$\{\w+\}")
HIDDEN = "***"


def with_environment(url: str) -> str:
    """An address with `$NAME` and `${NAME}` filled in from the environment, which is where secrets belong.

    Raises:
        ValueError: the environment has no such name.
    """
    missing = [name for name in re.findall(r"\$\{?(\w+)\}?", url) if name not in os.environ]
    if missing:
        raise ValueError(f"reward.url={without_secrets(url)}: the environment has no {missing[0]}.")
    return os.path.expandvars(url)


def without_secrets(url: str) -> str:
    """An address with user, password and the values of its query hidden, but for plain ones. Names of the environment
    stay.
    """
    scheme, marks, rest = url.partition("://") if "://" in url else ("", "", url)
    user, at, rest = rest.rpartition("@")
    address, question, query = rest.partition("#")[0].partition("?")
    user = ":".join(part if NAME.fullmatch(part) else HIDDEN for part in user.split(":", 1)) if at else ""
    fields = [field.partition("=") for field in re.split("[&;]", query)] if question else []
    shown_fields = [
        name + equals + (value if name.lower() in PLAIN or NAME.fullmatch(value) or not equals else HIDDEN)
        for name, equals, value in fields
    ]
    path, semicolon, _ = address.partition(";")
    address = path + (f";{HIDDEN}" if semicolon else "")
    return f"{scheme}{marks}{user}{at}{address}{question}{'&'.join(shown_fields)}"


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary as it may be written down."""
    reward = settings.get("reward")
    if not isinstance(reward, dict) or not reward.get("url"):
        return settings
    return settings | {"reward": reward | {"url": without_secrets(reward["url"])}}
