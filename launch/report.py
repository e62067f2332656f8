"""Write the report of a run, or of several side by side: one HTML page that opens offline.

    python launch/report.py runs/ppo
    python launch/report.py runs/ppo runs/ppo_kl0 --output comparison.html

Reads the folders of runs, also of one that is still going on, and writes OUT/report.html. It loads no model.
"""

import argparse
from pathlib import Path

from engine.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="the --output_dir of a run")
    parser.add_argument("--output", type=Path, help="the file to write (default: report.html in the first OUT)")
    given = parser.parse_args()
    try:
        print(f"Report: {write_report(given.folders, given.output)}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
