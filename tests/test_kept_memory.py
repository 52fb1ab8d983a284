"""Freed memory that stays with a process which has only the CPU, and is that of one step."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from distill.devices import backend

PROGRAM = """
import resource, sys
from distill import cli
from distill.devices import backend
backend.entry_points, backend.find_spec = lambda group: (), lambda name: None  # whatever accelerators this machine has
cli.set_up_jax(keep=sys.argv[1] == "keep")
import jax, jax.numpy as jnp
x = jax.block_until_ready(jnp.ones((2_048, 256)))
# two products that nothing fuses: 64 MB in between, asked for anew in every call
step = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ jnp.ones((256, 8_192))) @ jnp.ones((8_192, 4))))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted([faults() for _ in range(12)][3:])[4])
print(all([step(x).is_ready() for _ in range(9)]))
"""


def faults_and_order(argument):
    """The median of a process's page faults in a step, and whether every step had ended when its call came back."""
    environment = {name: value for name, value in os.environ.items() if "GLIBC" not in name and name != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM, argument]
    faults, ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return int(faults), ended == "True"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_gets_the_memory_of_the_step_before():
    faults, ended = faults_and_order("keep")
    assert faults < 100 and ended  # else the step before may still hold what it has to give
    faults, ended = faults_and_order("leave")
    assert faults > 5_000 and not ended  # 64 MB in pages of 4 kB are 16 384


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
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: libraries[library])
    monkeypatch.setattr(backend, "entry_points", lambda group: plugins)
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *setting: calls.append(setting))
    assert backend.keep_memory() is kept and bool(calls) is kept
    assert (("jax_cpu_enable_async_dispatch", False) in calls) is kept
