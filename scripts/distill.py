"""Trains teacher and student, evaluates them and prints a table. The same command resumes an unfinished run.

python scripts/distill.py --config addition
python scripts/distill.py --config addition --run runs/hot --objective.temperature 4
python scripts/distill.py --config addition --run runs/hot --objective.temperature 4 --profile   # records a profile
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Runs the experiment and prints its summary."""
    options, config = cli.parse_config(__doc__, argv)
    from distill.experiments import kinds

    cli.set_up_jax(keep=kinds.kind_of(config).large_steps)
    from distill.experiments import runner

    runner.print_summary(runner.run_experiment(config, options.run), options.run)


if __name__ == "__main__":
    cli.run_main(main)
