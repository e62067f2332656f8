"""All checks, one after another, and what came of them."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from engine.doctor import data, folders, installation, machine, models, network, scores
from engine.doctor.findings import Finding, Skipped, failed
from engine.doctor.subject import Subject

Check = Callable[[Subject], Finding | None]
OF_THE_MACHINE: list[Check] = [*installation.CHECKS, *machine.CHECKS, *network.CHECKS]
OF_A_CONFIG: list[Check] = [*models.CHECKS, *data.CHECKS, *scores.CHECKS, *folders.CHECKS]
LIMIT_S = 300  # for one check; those that wait for networks and processes have shorter ones of their own


def examine(subject: Subject, checks: Sequence[Check] | None = None) -> Iterable[Finding]:
    """The findings as they are made.

    Args:
        checks: those to make; by default all of the machine's, and those of a configuration where there is one.
    """
    if checks is None:
        checks = [*OF_THE_MACHINE, *(OF_A_CONFIG if subject.settings else ())]
    for check in checks:
        finding = _found_by(check, subject)
        if finding is not None:
            yield replace(finding, check=check.__name__.replace("_", " "))


def _found_by(check: Check, subject: Subject) -> Finding | None:
    """What a check finds within LIMIT_S. It has a thread to itself, which is left behind if it does not end."""
    outcome: list[Finding | None] = []

    def run() -> None:
        try:
            outcome.append(check(subject))
        except Skipped as skipped:
            outcome.append(Finding("skipped", str(skipped)))
        except ValueError as error:
            outcome.append(failed(str(error)))
        except BaseException as error:  # of the check itself, or of a library that does not work
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"the check itself failed: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            outcome.append(failed(said, "See whether the installation is whole (the lines above)."))

    thread = threading.Thread(target=run, daemon=True)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no finding
        thread.start()
        thread.join(LIMIT_S)
    return outcome[0] if outcome else failed(f"no answer within {LIMIT_S} s.", "See what it waits for.")
