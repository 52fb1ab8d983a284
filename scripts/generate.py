"""Completes prompts with teacher and student side by side.

python scripts/generate.py --run runs/addition 47+85= 5+7=
python scripts/generate.py --run runs/addition --best exact_match 47+85=   # best checkpoint instead of the newest
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Completes the prompts and prints a table."""
    options = cli.parser(__doc__)
    options.add_argument("--run", type=Path, required=True, help="a run folder made by scripts/distill.py")
    options.add_argument("--best", metavar="METRIC", help="use the student's best checkpoint by a metric, such as kl")
    options.add_argument("prompts", nargs="+", help="prompts, such as 47+85=")
    known = options.parse_args(argv)
    cli.set_up_jax()
    from distill.experiments import runner
    from distill.reports.table import print_answers

    print_answers(runner.answer(known.run, known.prompts, known.best))


if __name__ == "__main__":
    cli.run_main(main)
