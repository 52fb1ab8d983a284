"""Makes the numbers of REPRODUCE.md again; what is done already is kept in the run folder and not done twice.

python scripts/reproduce.py addition            # every arm, five seeds: about an hour of CPU time
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, runs, writes the page."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("addition",))
    options.add_argument("--run", type=Path, default=Path("runs/addition_arms"), help="run folder")
    options.add_argument("--page", type=Path, default=Path("REPRODUCE.md"), help="the page to write")
    known = options.parse_args(argv)
    cli.set_up_jax()
    from distill import reproduce
    from distill.config import load_config

    reproduce.addition(load_config("addition_arms"), known.run, known.page)
    print(f"written: {known.page}")


if __name__ == "__main__":
    cli.run_main(main)
