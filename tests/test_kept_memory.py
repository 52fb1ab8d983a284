"""Freed memory that stays with a process which has only the CPU."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from distill import cli
kept = cli.keep_memory() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
x = np.ones((2_048, 256), np.float32)
# two products that nothing fuses: 64 MB in between, asked for anew in every call
step = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ jnp.ones((256, 8_192))) @ jnp.ones((8_192, 4))))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = [faults() for _ in range(3)]
print(kept, sorted(faults() for _ in range(9))[4])
"""


def of_a_process(argument, **environment):
    """What ``keep_memory`` returned, and the median of a step's page faults."""
    known = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    command = [sys.executable, "-c", PROGRAM, argument]
    answer = subprocess.run(command, env=known | environment, capture_output=True, text=True, check=True).stdout
    kept, faults = answer.split()
    return kept, int(faults)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
@pytest.mark.skipif(bool(entry_points(group="jax_plugins") or find_spec("libtpu")), reason="not only the CPU")
def test_a_step_gets_the_memory_of_the_step_before():
    kept, faults = of_a_process("keep")
    assert kept == "True" and faults < 100
    assert of_a_process("leave")[1] > 5_000  # 64 MB in pages of 4 kB are 16 384


def test_a_caller_who_has_chosen_is_left_alone():
    assert of_a_process("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"
