"""What a run will need on a slice of chips: the real step, lowered on shapes alone; no accelerator, no weights.

python scripts/plan.py --config qwen3_8b_to_0p6b --topology v5e:4x4
python scripts/plan.py --config llama3_70b_to_8b --topology v5p:4x4x4 --training.micro-batches 8 --json plan.json
python scripts/plan.py --config qwen3_8b_to_0p6b --topology gpu:8      # H100s, estimated; a100:8 for A100s

For TPUs (pip install -e ".[tpu]"; no TPU is needed) it is compiled by their compiler; minutes on two cores.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not scripts/, whose distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Parses, lowers, compiles, prints."""
    extra = {
        "topology": (None, None, "v5e:4x4, v5p:2x2x4, v6e:4x4, or a number of GPUs: h100:8, a100:8, gpu:8"),
        "json": (None, None, "a file for programs"),
        "dollars-per-hour": (None, None, "for one chip; default: a list price"),
        "try": ("1", None, "where it does not fit: how many changes to compile, the cheapest first"),
    }
    options, config = cli.parse_config(__doc__, argv, **extra)
    from distill.config import write_json
    from distill.devices.chips import parse_topology, prepare_jax
    from distill.planning.plan import check, plan, print_plan

    dollars, tries = check(config, options.dollars_per_hour, getattr(options, "try"))
    topology = parse_topology(options.topology or "")
    prepare_jax(topology)
    values = plan(config, topology, dollars_per_hour=dollars, tries=tries)
    print_plan(values)
    if options.json:
        write_json(Path(options.json), values)


if __name__ == "__main__":
    cli.run_main(main)
