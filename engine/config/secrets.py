"""What of a setting may be written down."""

import os
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SECRET = re.compile(r"key|token|secret|password|passwd|auth|signature|credential", re.IGNORECASE)
HIDDEN = "***"


def with_environment(url: str) -> str:
    """An address with `$NAME` and `${NAME}` filled in from the environment, which is where secrets belong.

    Raises:
        ValueError: the environment has no such name.
    """
    filled = os.path.expandvars(url)
    if (missing := re.search(r"\$\{?(\w+)\}?", filled)) and missing[0] in url:
        raise ValueError(f"reward.url={url}: the environment has no {missing[1]}.")
    return filled


def without_secrets(url: str) -> str:
    """An address whose password, and what its query calls a key, a token or the like, are hidden. Names of the
    environment stay.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at and not user.startswith("$"):
        name, colon, password = user.partition(":")
        user = f"{name}:{HIDDEN}" if colon and not password.startswith("$") else user if colon else HIDDEN
    fields = [field.partition("=") for field in parts.query.split("&")] if parts.query else []
    hidden = [
        f"{name}={HIDDEN}" if SECRET.search(name) and not value.startswith("$") else f"{name}{equals}{value}"
        for name, equals, value in fields
    ]
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query="&".join(hidden)))


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary as it may be written down."""
    reward = settings.get("reward")
    if not isinstance(reward, dict) or not reward.get("url"):
        return settings
    return settings | {"reward": reward | {"url": without_secrets(reward["url"])}}
