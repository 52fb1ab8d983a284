"""A whole distillation step beside a plain PyTorch loop: seconds, ratios, peak resident memory.

pip install -e ".[bench]"                                            # PyTorch, the peer
python scripts/benchmark_step.py --vocab 512                         # about a minute; 8192 and 49152 take longer
python scripts/benchmark_step.py --vocab 512 --python OTHER/python   # PyTorch of another environment
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, measures, prints."""
    options = cli.parser(__doc__)
    options.add_argument("--vocab", type=int, default=512)
    options.add_argument("--python", default=sys.executable, help="interpreter that has torch and transformers")
    chosen = options.parse_args(argv)
    from distill import benchmark_step

    torch = [chosen.python, str(Path(__file__).parent / "peers" / "torch_step.py"), str(chosen.vocab)]
    found = subprocess.run([chosen.python, "-c", "import torch, transformers"], capture_output=True)
    peers = {"plain PyTorch loop": torch} if found.returncode == 0 else {}
    lines = benchmark_step.step(chosen.vocab, peers, Path("runs/benchmark_step.json"))
    print("\n".join(lines if peers else [*lines, "missing: PyTorch and transformers; pip install -e '.[bench]'."]))


if __name__ == "__main__":
    cli.run_main(main)
