"""Trains one model on the labels of the train side: a teacher, or a student without a teacher.

python scripts/train.py --config addition --role teacher --run runs/teacher
python scripts/train.py --config addition --role student --run runs/skyline --student.training.steps 3000
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # scripts/distill.py would hide the package

from distill import cli


def main(argv: Sequence[str]) -> None:
    """Trains the model."""
    role = ("teacher", ("teacher", "student"), "use the recipe of this role")
    options, config = cli.parse_config(__doc__, argv, role=role)
    cli.set_up_jax()
    from distill.experiments import runner
    from distill.experiments.addition import run as experiment
    from distill.experiments.addition.config import Config
    from distill.experiments.folder import write_config

    if not isinstance(config, Config):
        raise ValueError(f"--config {options.config}: expected one that trains its own teacher, such as addition.")
    recipe = config.teacher if options.role == "teacher" else config.student
    world = experiment.prepare(config, options.run)
    runner.train(experiment.alone(world, recipe, options.run, options.role), config)
    write_config(options.run, config)
    print(f"{options.role}: {recipe.training.steps} steps; the run folder is {options.run}")


if __name__ == "__main__":
    cli.run_main(main)
