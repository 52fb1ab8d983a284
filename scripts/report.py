"""Writes RUN/report.html, one self-contained page, and its PNGs from run folders.

python scripts/report.py --run runs/addition
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints its path."""
    options = cli.parser(__doc__)
    options.add_argument("--run", type=Path, nargs="+", required=True, help="run folders; the page goes into the first")
    runs = options.parse_args(argv).run
    from distill.experiments.kinds import report_in

    print(f"report: {report_in(*runs).write_report(runs)}")


if __name__ == "__main__":
    cli.run_main(main)
