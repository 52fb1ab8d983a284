"""Measurements, contestants in turn in one run: medians with [least, most].

pip install -e ".[bench]"              # PyTorch, the peer
python scripts/benchmark.py tiny       # steps per second against eager PyTorch; start-up; about 3 minutes
python scripts/benchmark.py head       # memory and time of the loss head, chunked against plain; about 4 minutes
pip install -e ".[tpu]"                # the compiler for TPUs; no TPU is needed
python scripts/benchmark.py tpu        # the head compiled for v5e slices: memory, collectives; about 2 minutes
"""

import sys
from collections.abc import Sequence
from pathlib import Path

peers = str(Path(__file__).parent / "peers")
sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, measures, prints."""
    options = cli.parser(__doc__)
    options.add_argument("what", choices=("tiny", "head", "tpu"))
    what = options.parse_args(argv).what
    from distill import benchmark, benchmark_head, benchmark_tpu

    if what == "head":
        print("\n".join(benchmark_head.head(Path("runs/benchmark_head.png"))))
        return
    if what == "tpu":
        print("\n".join(benchmark_tpu.tpu()))
        return

    sys.path.append(peers)
    try:
        from torch_tiny import PEERS
    except ImportError as error:
        raise ValueError(f"{error}: the peer is missing; pip install -e '.[bench]'.") from error
    print("\n".join(benchmark.tiny(PEERS)))
    print(f"indices of one batch of 256: {benchmark.time_data():.2f} ms of Python, while the device computes")


if __name__ == "__main__":
    cli.run_main(main)
