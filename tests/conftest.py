"""Strict JAX on 8 CPU devices: rank promotion raises, warnings are errors, the losses check their shapes."""

import contextlib
import gc
import os
import shutil
import tempfile
import time
from pathlib import Path

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

# Compiled programs outlive the session. JAX writes an entry in place, and a neighbour could read half of one. So every
# process of pytest has a folder of its own; it begins with links to the entries of SHARED and hands its new ones back.
SHARED = cli.compile_cache() / "tests"
SHARED.mkdir(parents=True, exist_ok=True)
OWN = Path(tempfile.mkdtemp(prefix="tests-", dir=SHARED.parent))
# The environment is for scripts, in this process and in others.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(OWN)
jax.config.update("jax_compilation_cache_dir", str(OWN))
# XLA's cache for GPUs would put the name of the folder into the key of every entry: nobody else's would be found.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Without this table a long file may start last, and one worker waits for it.
HEAVY = (
    *("test_features.py", "test_processes.py", "test_train.py", "test_divergences.py", "test_chunked.py"),
    *("test_step.py", "test_text_experiment.py", "test_parallel.py", "test_sentences.py"),
)
"""Names of the files that take longest, longest first."""


def link_entries(source, target):
    """Link the files of one folder into another one; a link is there whole or not at all."""
    for name in set(os.listdir(source)) - set(os.listdir(target)):
        with contextlib.suppress(OSError):  # a neighbour linked it first, or the file system has no links
            os.link(source / name, target / name)


def pytest_configure(config):
    # A machine that went down may have left a damaged entry: JAX warns and compiles.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_sessionstart(session):
    link_entries(SHARED, OWN)
    for folder in SHARED.parent.glob("tests-*"):  # what a killed session left
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
