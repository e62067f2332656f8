"""What a check says."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal

Status = Literal["ok", "skipped", "warning", "failed"]
WORST_LAST = ("skipped", "ok", "warning", "failed")


class Skipped(Exception):  # noqa: N818 - not an error: another check has told of it
    """What a check would look at is not to be had, and an earlier check has said why."""


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        found: what was found.
        remedy: what to do about it; empty where nothing is to be done.
        check: whose finding it is.
    """

    status: Status
    found: str
    remedy: str = ""
    check: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, remedy: str) -> Finding:
    return Finding("warning", found, remedy)


def failed(found: str, remedy: str = "") -> Finding:
    return Finding("failed", found, remedy)


def of_each(items: Iterable[Any], look: Callable[[Any], Finding]) -> Finding | None:
    """The worst that there is to say of any item; what several have in common in seriousness is said of all of them."""
    findings = []
    for item in items:
        try:
            findings.append(look(item))
        except Skipped as skipped:
            findings.append(Finding("skipped", str(skipped)))
        except ValueError as error:
            findings.append(failed(str(error)))
    if not findings:
        return None
    worst = max((finding.status for finding in findings), key=WORST_LAST.index)
    told = [finding for finding in findings if finding.status == worst]
    remedies = dict.fromkeys(finding.remedy for finding in told if finding.remedy)
    return Finding(worst, "; ".join(dict.fromkeys(finding.found for finding in told)), " ".join(remedies))


def with_remedy(remedy: str) -> Callable[[Callable], Callable]:
    """Of a check: what to do where it fails, or raises a ValueError, without saying so itself."""

    def decorate(check: Callable) -> Callable:
        @wraps(check)
        def decorated(subject: Any) -> Finding | None:
            try:
                finding = check(subject)
            except ValueError as error:
                finding = failed(str(error))
            plain = finding is not None and finding.status == "failed" and not finding.remedy
            return replace(finding, remedy=remedy) if plain else finding

        return decorated

    return decorate
