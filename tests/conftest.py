"""Strict JAX on 8 CPU devices: rank promotion raises, warnings are errors, the losses check their shapes."""

import contextlib
import gc
import os
import shutil
import tempfile
import time
from pathlib import Path

# All of this must run before the first import of jax.
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}
"""Eight devices; and what is compiled here runs once or twice: LLVM's optimisation costs more time than it saves."""
for _flag, _value in FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
os.environ.setdefault("NPROC", "16")  # a larger thread pool: 8 devices on few cores can deadlock otherwise
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

from distill import cli

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs outlive a run of pytest. JAX writes an entry in place, so another process could read half of one.
# Every process of pytest therefore has its own folder. It starts with links to SHARED and links new entries back.
SHARED = cli.compile_cache() / "tests"
SHARED.mkdir(parents=True, exist_ok=True)
OWN = Path(tempfile.mkdtemp(prefix="tests-", dir=SHARED.parent))
# The environment variable applies to scripts, in this process and in others.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(OWN)
jax.config.update("jax_compilation_cache_dir", str(OWN))
# XLA's cache for GPUs would put the name of the folder into every key, so that no other process finds the entry.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Without this table a long file may start last, and all workers wait for it.
HEAVY = (
    *("test_features.py", "test_processes.py", "test_train.py", "test_divergences.py", "test_chunked.py"),
    *("test_step.py", "test_text_experiment.py", "test_parallel.py", "test_sentences.py"),
)
"""Names of the files that take longest, longest first."""


def link_entries(source, target):
    """Links the files of one folder into another; unlike a copy, a link is never partial."""
    for name in set(os.listdir(source)) - set(os.listdir(target)):
        with contextlib.suppress(OSError):  # another process linked it first, or the file system has no links
            os.link(source / name, target / name)


def pytest_configure(config):
    # A crashed machine may leave a damaged entry: JAX warns and compiles.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_sessionstart(session):
    link_entries(SHARED, OWN)
    for folder in SHARED.parent.glob("tests-*"):  # left by a killed run
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder, ignore_errors=True)


def pytest_sessionfinish(session):
    link_entries(OWN, SHARED)
    shutil.rmtree(OWN, ignore_errors=True)


def pytest_collection_modifyitems(items):
    # xdist deals whole files in this order (--dist loadfile --no-loadscope-reorder).
    places = {name: place for place, name in enumerate(HEAVY)}
    items.sort(key=lambda item: places.get(item.path.name, len(HEAVY)))


def pytest_collection_finish(session):
    # Tracing creates many short-lived objects. Freezing spares the collector modules and tests, which live on.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
"""Every compiled program maps memory some times. Linux allows a process 65 530 maps; XLA crashes beyond them."""


@pytest.fixture(scope="module", autouse=True)
def _few_maps():
    """Drops compiled programs after a module where there are many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# From here on shapes and types of the losses are checked at every call.
jaxtyping.install_import_hook("distill.losses", "beartype.beartype")


@pytest.fixture(scope="session")
def addition(tmp_path_factory):
    """``(config, {"train": Examples, "test": Examples})`` of one-digit addition, prepared in a temporary folder."""
    from distill.data.addition import AdditionConfig, load

    config = AdditionConfig(digits=1)
    return config, load(config, tmp_path_factory.mktemp("tfds"))
