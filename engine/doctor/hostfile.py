"""The hostfile of the deepspeed launcher: `name slots=8`, a line each."""

import re
from pathlib import Path

# What follows is nothing to the launcher; a name with a dash in front would be a flag to ssh.
LINE = re.compile(r"([^\s-]\S*)\s+slots=(\d+)")


def hosts_in(hostfile: str) -> dict[str, int]:
    """Host -> its slots.

    Raises:
        ValueError: it cannot be read, names no host, or has a line that the launcher would refuse.
    """
    try:
        lines = Path(hostfile).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {hostfile} cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = LINE.match(line.strip())
        if found is None:
            raise ValueError(f"{hostfile}, line {number}: {line.strip()!r} is not of the form `name slots=8`.")
        if found[1] in hosts:
            raise ValueError(f"{hostfile}, line {number}: {found[1]} is there twice. Give it one line with all slots.")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"--hostfile {hostfile} names no host. A line is `name slots=8`.")
    return hosts
