"""Makes the numbers of REPRODUCE.md again; what is done already is kept in the run folder and not done twice.

python scripts/reproduce.py addition            # every arm, five seeds: about an hour of CPU time
    python scripts/reproduce.py kills               # 20 times kill -9, then the same bits: about 6 minutes
    python scripts/reproduce.py conformance         # our losses beside TRL's, Liger's, DistiLLM's: seconds
    python scripts/reproduce.py smollm2             # a published model on two texts beside transformers: a minute
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

peers = str(Path(__file__).parent / "peers")
sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, runs, writes the page."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("addition", "kills", "conformance", "smollm2"))
    options.add_argument("--run", type=Path, default=Path("runs/addition_arms"), help="run folder")
    options.add_argument("--page", type=Path, default=Path("REPRODUCE.md"), help="the page to write")
    known = options.parse_args(argv)
    cli.set_up_jax()
    from distill import reproduce
    from distill.config import load_config

    if known.what == "conformance":
        from distill import conformance

        sys.path.append(peers)
        try:
            import torch_conformance
        except ImportError as error:
            raise ValueError(f"{error}: a library is missing; pip install -e '.[conformance]'.") from error
        conformance.collect(*torch_conformance.measure())
        print(f"written: {conformance.STORED}, {conformance.PAGE}")
        return
    if known.what == "smollm2":
        from distill import golden

        print(*golden.smollm2(), sep="\n")
        return
    if known.what == "kills":
        often = [f"--{role}.training.save-every=100" for role in ("teacher", "student")]
        with tempfile.TemporaryDirectory() as folder:
            runs = reproduce.kills(20, Path(folder), often)
        print(f"20 kills, {runs} runs taken up to their end: every weight equal to the bit")
        return
    reproduce.addition(load_config("addition_arms"), known.run, known.page)
    print(f"written: {known.page}")


if __name__ == "__main__":
    cli.run_main(main)
