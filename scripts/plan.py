"""Plans a run on a slice of chips: memory, time and cost of the real step, without accelerator and weights.

python scripts/plan.py --config qwen3_8b_to_0p6b --topology v5e:4x4
python scripts/plan.py --config llama3_70b_to_8b --topology v5p:4x4x4 --training.micro-batches 8 --json plan.json
python scripts/plan.py --config qwen3_8b_to_0p6b --topology gpu:8      # an estimate for H100s; a100:8 for A100s

For TPUs the compiler for TPUs compiles the step (pip install -e ".[tpu]"; no TPU is needed); minutes on two cores.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Compiles the step and prints the plan."""
    extra = {
        "topology": (None, None, "v5e:4x4, v5p:2x2x4, v6e:4x4, or a number of GPUs: h100:8, a100:8, gpu:8"),
        "json": (None, None, "also write the plan as JSON to this file"),
        "dollars-per-hour": (None, None, "price of one chip; default: a list price"),
        "try": ("1", None, "proposed changes to compile if the step does not fit, the cheapest first"),
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
