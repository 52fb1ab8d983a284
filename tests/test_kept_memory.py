"""The settings that keep freed memory in the process on a CPU, and where they do not apply."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from distill.devices import backend

PROGRAM = """
from distill import cli
from distill.devices import backend
backend.entry_points, backend.find_spec = lambda group: (), lambda name: None  # whatever accelerators this machine has
cli.set_up_jax(keep=True)
import jax, jax.numpy as jnp
x = jax.block_until_ready(jnp.ones((2_048, 256)))
# two products that nothing fuses: 64 MB in between
step = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ jnp.ones((256, 8_192))) @ jnp.ones((8_192, 4))))
print(all([step(x).is_ready() for _ in range(9)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_has_ended_when_its_call_returns():
    """Otherwise the next step would allocate memory that the previous step still holds."""
    environment = {name: value for name, value in os.environ.items() if "GLIBC" not in name and name != "XLA_FLAGS"}
    environment.pop("MALLOC_ARENA_MAX", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize(
    ("tunables", "plugins", "library", "kept"),
    [
        ("glibc.malloc.hugetlb=1", (), "glibc", True),
        ("glibc.malloc.arena_max=2", (), "glibc", False),
        ("", ("cuda",), "glibc", False),
        ("", (), "another", False),
    ],
)
def test_settings_are_left_alone_where_they_do_not_apply(monkeypatch, tunables, plugins, library, kept):
    calls = []
    libraries = {"glibc": SimpleNamespace(mallopt=lambda *call: calls.append(call) or 1), "another": SimpleNamespace()}
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: libraries[library])
    monkeypatch.setattr(backend, "entry_points", lambda group: plugins)
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *setting: calls.append(setting))
    settings = [(-8, 1), (-1, -1), (-4, 0), ("jax_cpu_enable_async_dispatch", False)]  # malloc.h: arenas, trim, mmap
    assert backend.keep_memory() is kept and calls == (settings if kept else [])
