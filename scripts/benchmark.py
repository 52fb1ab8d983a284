"""Measurements, contestants in turn in one run: medians with [least, most].

pip install -e ".[bench]"              # PyTorch, the peer
python scripts/benchmark.py tiny       # steps per second against eager PyTorch; start-up; about 3 minutes
python scripts/benchmark.py head       # memory and time of the loss head, chunked against plain; about 4 minutes
pip install -e ".[tpu]"                # the compiler for TPUs; no TPU is needed
python scripts/benchmark.py tpu        # the head compiled for v5e slices: memory, collectives; about 2 minutes
pip install -e ".[cuda,conformance]"   # on a machine with a GPU
python scripts/benchmark.py liger      # the head against Liger's: milliseconds, peak memory
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

peers = str(Path(__file__).parent / "peers")
sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, measures, prints."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("tiny", "head", "tpu", "liger"))
    what = options.parse_args(argv).what
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same GPU
    from distill import benchmark, benchmark_head, benchmark_tpu

    if what == "head":
        show(benchmark_head.head(Path("runs/benchmark_head.png")))
    elif what == "tpu":
        show(benchmark_tpu.tpu())
    elif what == "liger":
        benchmark_head.need_gpu()
        liger = peers_of("torch_liger", "conformance")
        show([*benchmark_head.agreement(liger), *benchmark_head.beside(liger)])
    else:
        show(benchmark.tiny(peers_of("torch_tiny", "bench")))
        show([f"indices of one batch of 256: {benchmark.time_data():.2f} ms of Python, while the device computes"])


def peers_of(module: str, extra: str) -> dict:
    """``PEERS`` of a module of scripts/peers."""
    sys.path.append(peers)
    try:
        return importlib.import_module(module).PEERS
    except ImportError as error:
        raise ValueError(f"{error}: the peer is missing; pip install -e '.[{extra}]'.") from error


def show(lines: Sequence[str]) -> None:
    """Prints them."""
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run_main(main)
