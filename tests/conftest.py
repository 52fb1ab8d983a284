"""Strict JAX on 8 CPU devices: rank promotion raises, warnings are errors, the losses check their shapes."""

import gc
import os

# All of this must stand before the first import of jax.
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}
"""Eight devices; and what is compiled here runs once or twice: LLVM's optimisation costs more time than it saves."""
for _flag, _value in FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
os.environ.setdefault("NPROC", "16")  # a larger thread pool: 8 devices on few cores can otherwise dead-lock
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

from distill import cli

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs outlive the session. One folder for each xdist worker: JAX writes entries in place, and a
# neighbour could read half of one.
CACHE = cli.compile_cache() / f"tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_configure(config):
    # Another process may be writing the entry that is read: JAX says so and compiles.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_collection_finish(session):
    # Tracing makes many objects that die young. What stands by now, modules and tests, is looked at no more.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)


# Shapes and types of the losses are checked at every call, from here on.
jaxtyping.install_import_hook("distill.losses", "beartype.beartype")


@pytest.fixture(scope="session")
def addition(tmp_path_factory):
    """``(config, {"train": Examples, "test": Examples})`` of one-digit addition, prepared in a folder of its own."""
    from distill.data.addition import AdditionConfig, load

    config = AdditionConfig(digits=1)
    return config, load(config, tmp_path_factory.mktemp("tfds"))
