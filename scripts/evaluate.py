"""Evaluates the models of a run folder again, prints a table and writes RUN/evaluation.json.

python scripts/evaluate.py --run runs/addition
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Evaluates a run folder and prints its summary."""
    options = cli.parser(__doc__)
    options.add_argument("--run", type=Path, required=True, help="a run folder made by scripts/distill.py")
    run = options.parse_args(argv).run
    cli.set_up_jax()
    from distill.experiments import runner

    runner.print_summary(runner.evaluate_folder(run), run)


if __name__ == "__main__":
    cli.run_main(main)
