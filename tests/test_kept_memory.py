"""Freed memory that stays with a process which has only the CPU."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from distill import cli

PROGRAM = """
import resource, sys
import numpy as np
from distill import cli
cli.entry_points, cli.find_spec = lambda group: (), lambda name: None  # whatever accelerators this machine has
cli.set_up_jax(keep=sys.argv[1] == "keep")
import jax, jax.numpy as jnp
x = np.ones((2_048, 256), np.float32)
# two products that nothing fuses: 64 MB in between, asked for anew in every call
step = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ jnp.ones((256, 8_192))) @ jnp.ones((8_192, 4))))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted([faults() for _ in range(12)][3:])[4])
"""


def faults_of_a_step(argument):
    """The median of a process's page faults in a step."""
    environment = {name: value for name, value in os.environ.items() if "GLIBC" not in name and name != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM, argument]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_gets_the_memory_of_the_step_before():
    assert faults_of_a_step("keep") < 100
    assert faults_of_a_step("leave") > 5_000  # 64 MB in pages of 4 kB are 16 384


@pytest.mark.parametrize(
    ("tunables", "plugins", "library", "kept"),
    [
        ("glibc.malloc.hugetlb=1", (), "glibc", True),
        ("glibc.malloc.arena_max=2", (), "glibc", False),
        ("", ("cuda",), "glibc", False),
        ("", (), "another", False),
    ],
)
def test_a_choice_an_accelerator_and_another_library_are_left_alone(monkeypatch, tunables, plugins, library, kept):
    calls = []
    libraries = {"glibc": SimpleNamespace(mallopt=lambda *call: calls.append(call) or 1), "another": SimpleNamespace()}
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: libraries[library])
    monkeypatch.setattr(cli, "entry_points", lambda group: plugins)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert cli.keep_memory() is kept and bool(calls) is kept
