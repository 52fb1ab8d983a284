"""Makes the numbers of REPRODUCE.md again; what is done already is kept in the run folder and not done twice.

python scripts/reproduce.py addition            # every arm, five seeds: an hour of CPU time, half that on two cores
python scripts/reproduce.py survival            # 50 times kill -9 and other failures, then the same bits
python scripts/reproduce.py conformance         # our losses beside TRL's, Liger's, DistiLLM's: seconds
python scripts/reproduce.py golden              # a published model on two texts beside transformers: a minute
python scripts/reproduce.py smollm2             # distilled on text, three seeds: an hour and a half
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

peers = str(Path(__file__).parent / "peers")
sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, runs, writes the page."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("addition", "survival", "conformance", "golden", "smollm2"))
    options.add_argument("--run", type=Path, help="run folder (default: runs/addition_arms, runs/smollm2_seeds)")
    options.add_argument("--page", type=Path, default=Path("REPRODUCE.md"), help="the page to write")
    known = options.parse_args(argv)
    if known.what == "addition":
        os.environ.setdefault("NPROC", "1")  # threads of XLA on a CPU, here and in the workers
    cli.set_up_jax(keep=known.what == "smollm2")
    from distill.config import load_config
    from distill.reproduce import addition, conformance, golden, survival, text

    def run(name: str) -> Path:
        return known.run or Path("runs") / name

    {
        "addition": lambda: addition.addition(
            load_config("addition_arms"), run("addition_arms"), known.page, cli.set_up_jax
        ),
        "survival": lambda: survival.section(known.page),
        "conformance": lambda: conformance.run(peers),
        "golden": lambda: print(*golden.smollm2(), sep="\n"),
        "smollm2": lambda: text.text(load_config("smollm2_text"), run("smollm2_seeds"), known.page),
    }[known.what]()
    if known.what in ("addition", "smollm2"):
        print(f"written: {known.page}")


if __name__ == "__main__":
    cli.run_main(main)
