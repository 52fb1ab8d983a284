"""Benchmarks: contestants are measured in turn within one run; prints medians with [least, most].

pip install -e ".[bench]"              # PyTorch, for comparison
python scripts/benchmark.py tiny       # steps per second beside eager PyTorch; start-up; about 4 minutes
python scripts/benchmark.py head       # memory and time of the loss head, chunked and plain; about 4 minutes
python scripts/benchmark.py attention  # the form of this platform beside the plain form, by length
python scripts/benchmark.py step       # a whole step beside PyTorch, TRL, Tunix and EasyDeL; about 2 minutes
                                       # --vocab 8192 --python TRL=PATH Tunix=PATH: Python interpreters
python scripts/benchmark.py scaling    # 1 to 8 CPU devices and two processes: losses, bytes sent; cost of sizes
python scripts/benchmark.py tpu        # the head compiled for v5e slices (.[tpu], no TPU needed); about 2 minutes
pip install -e ".[cuda,conformance]"   # on a machine with a GPU
python scripts/benchmark.py pair       # a published pair, random weights, beside PyTorch: seconds, memory
python scripts/benchmark.py liger      # the head beside Liger's: milliseconds, peak memory
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints its lines."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("tiny", "head", "attention", "step", "scaling", "tpu", "liger", "pair"))
    options.add_argument("--vocab", type=int, default=512, help="step: vocabulary size")
    options.add_argument("--rounds", type=int, default=7, help="step, scaling: measured rounds, after the warm-up")
    options.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", help="step: interpreters of peers")
    options.add_argument("--pair", default="qwen3_8b_to_0p6b", help="pair: configuration that names both models")
    options.add_argument("--shape", type=int, nargs=2, default=(4, 2048), help="pair: rows, tokens of a row")
    chosen = options.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU

    def of(name):
        return importlib.import_module(f"distill.benchmarks.{name}")

    if chosen.what == "tiny":
        of("rounds").a_device_for_every_core()
    lines = {
        "tiny": lambda: of("tiny").tiny_and_data(of("rounds").peers_of(PEERS, "torch_tiny", "bench")),
        "head": lambda: of("head").head(Path("runs/benchmark_head.png")),
        "attention": lambda: of("attention").attention(),
        "step": lambda: of("step").step(chosen.vocab, chosen.rounds, PEERS, chosen.python),
        "scaling": lambda: of("scaling").scaling(chosen.rounds),
        "tpu": lambda: of("tpu").tpu(),
        "pair": lambda: of("pair").pair(chosen.pair, *chosen.shape, PEERS / "torch_pair.py"),
        "liger": lambda: of("head").liger(lambda: of("rounds").peers_of(PEERS, "torch_liger", "conformance")),
    }
    print("\n".join(lines[chosen.what]()))


if __name__ == "__main__":
    cli.run_main(main)
