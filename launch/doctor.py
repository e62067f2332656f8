"""Say what would keep a run from starting, or from going well, and what to do about it. Starts no training.

    python launch/doctor.py                                                        # this machine
    python launch/doctor.py --config launch/recipes/gsm8k_tiny.yaml --output_dir runs/ppo --num_accelerators 2
    python launch/doctor.py --hostfile hosts --ssh

A line per check: ok, warning, failed, or skipped where an earlier line says why; `--json` prints the same for
machines. What is not the doctor's own flag is the run's, of any stage. Exit code 0 when nothing failed, 1 when
something did, 2 for flags that make no sense.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

from engine import startup
from engine.doctor.examination import examine
from engine.doctor.findings import Finding
from engine.doctor.subject import Subject


def main() -> int:
    startup.imported()
    subject, as_json = asked()
    told = []
    for finding in examine(subject):
        told.append(finding)
        if not as_json:
            print(line(finding), flush=True)
    counts = {status: sum(finding.status == status for finding in told) for status in ("failed", "warning", "ok")}
    if as_json:
        print(json.dumps(counts | {"findings": [asdict(finding) for finding in told]}, indent=1))
    else:
        print(", ".join(f"{number} {status}" for status, number in counts.items()))
    return 1 if counts["failed"] else 0


def asked() -> tuple[Subject, bool]:
    """What is to be looked at, and whether the answer is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_accelerators", type=int, help="ranks on each machine; default: its GPUs, else 2")
    parser.add_argument("--hostfile", help="of a run on several machines, as for the deepspeed launcher")
    parser.add_argument("--ssh", action="store_true", help="log in to every machine of the hostfile")
    parser.add_argument("--stage", choices=("sft", "reward", "dpo", "ppo"), help="where the settings do not tell")
    parser.add_argument("--json", action="store_true")
    mine, settings = parser.parse_known_args()
    if settings and not settings[0].startswith("--"):
        parser.error(f"{settings[0]} is no flag; a recipe is named with --config.")
    if mine.num_accelerators is not None and mine.num_accelerators < 1:
        parser.error(f"--num_accelerators {mine.num_accelerators} must be at least 1.")
    if mine.ssh and mine.hostfile is None:
        parser.error("--ssh logs in to the machines of a --hostfile, and none is named.")
    given = dict(stage=mine.stage, hostfile=mine.hostfile, ssh=mine.ssh)
    return Subject(settings=settings, num_accelerators=mine.num_accelerators, **given), mine.json


def line(finding: Finding) -> str:
    """On one line, whatever a message holds: what cannot be printed is a space."""
    said = f"{finding.check}: {finding.found} {finding.remedy}"
    printable = "".join(letter if letter.isprintable() else " " for letter in said)
    return f"{finding.status:8} {' '.join(printable.split())}"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a check that has not ended in time would be waited for
