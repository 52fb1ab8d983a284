"""Teacher → student: trains what isn't trained yet, evaluates, prints the table. Resumes by itself from its run folder.

python scripts/distill.py --config addition
python scripts/distill.py --config addition --run runs/hot --objective.temperature 4
python scripts/distill.py --config addition --run runs/hot --objective.temperature 4 --profile   # where the time goes
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, runs, prints."""
    options, config = cli.parse_config(__doc__, argv)
    from distill.experiments import kinds

    cli.set_up_jax(keep=kinds.kind_of(config).large_steps)
    from distill.experiments import runner

    runner.print_summary(runner.run_experiment(config, options.run), options.run)


if __name__ == "__main__":
    cli.run_main(main)
