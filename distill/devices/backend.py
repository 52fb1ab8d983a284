"""Every decision that depends on the platform: cpu, cuda, rocm or tpu.

The models and losses read as their equations; where XLA computes a form of an equation faster on one platform, the
question "which form?" is answered here and nowhere else. All forms of one equation agree within rounding.

Most functions are asked while a program is traced: ``platform`` then answers for the device the program will run on,
which may be part of a machine that is not attached (compiling ahead of time).
"""

import ctypes
import math
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

UNROLLED = 8
"""Number of layers up to which a CPU program unrolls the scan over layers."""

BLOCKED_FROM = 32
"""Tokens from which causal attention on a CPU is computed in blocks of queries."""

FUSED_FROM = 256
"""Tokens from which causal attention on CUDA is one kernel of cuDNN."""

CPU_LOGITS = 2**18
"""Logits of student and of teacher that the chunked loss reads at a time on a CPU, so that they stay in its cache."""


# ---- the platform


def platform() -> str:
    """Platform of the program that is being traced: ``cpu``, ``cuda``, ``rocm`` or ``tpu``."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    if name != "gpu":
        return name
    return "rocm" if device is None and "rocm" in jax.local_devices()[0].client.platform_version else "cuda"


def platform_of(mesh: Any = None) -> str:
    """Platform of a mesh's devices: ``cpu``, ``gpu`` or ``tpu``; of the default backend without a concrete mesh.

    The devices may belong to a machine that is not attached (compiling ahead of time).
    """
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


# ---- forms of the models


def flatten_rows() -> bool:
    """Whether products with a kernel multiply matrices ``[B·L, D]`` instead of ``[B, L, D]``.

    XLA:CPU computes the gradient of the three-dimensional product more slowly. Other backends flatten by themselves.
    Where positions lie over the mesh, the two axes stay apart.
    """
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1


def as_rows(x: Any) -> Any:
    """``[B, L, …] -> [B·L, …]`` where ``flatten_rows()``; otherwise ``x``."""
    return x.reshape(-1, *x.shape[2:]) if flatten_rows() else x


def unroll(layers: int, remat: str = "none") -> int:
    """The ``unroll`` of ``nn.scan`` over layers: all of up to ``UNROLLED`` layers on a CPU, otherwise 1.

    A loop fills the stacks of residuals with zeros, then copies into and out of them; unrolled layers do not.
    Rematerialised layers stay a loop, which keeps the compiler from undoing the rematerialisation. So do layers on a
    mesh, whose parameters are gathered when used. Unrolling is untried on accelerators.
    """
    few = remat == "none" and layers <= UNROLLED and jax.sharding.get_abstract_mesh().empty
    return layers if few and platform() == "cpu" else 1


def block_attention(length: int) -> bool:
    """Whether causal attention is computed in blocks of queries. Blocks are untried on accelerators."""
    return length >= BLOCKED_FROM and platform() == "cpu"


def fuse_attention(platform: str, dtype: Any, length: int, size: int, softcap: float | None) -> bool:
    """Whether causal attention is the kernel that ``jax.nn.dot_product_attention`` takes from cuDNN.

    The kernel takes 16 bits, an even length, heads of at most 128 numbers in multiples of eight, and no softcap. TPUs
    keep the plain form: splash attention needs its masks before tracing, and here each layer chooses its window while
    the program runs.
    """
    fits = size % 8 == 0 and size <= 128 and length % 2 == 0 and softcap is None
    return platform == "cuda" and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and length >= FUSED_FROM and fits


def materialize(x: Any) -> Any:
    """Returns x unchanged; on a CPU the identity product stops XLA from recomputing x wherever it is used."""
    return x @ np.eye(x.shape[-1], dtype=x.dtype) if platform() == "cpu" else x


def by_platform(*arguments: Any, cpu: Callable, default: Callable) -> Any:
    """``cpu(*arguments)`` where the program is compiled for a CPU, otherwise ``default(*arguments)``."""
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)


def loop_replicas() -> bool:
    """Whether replicas of a small model are trained one after the other instead of under ``vmap``.

    One small replica leaves an accelerator idle. A CPU's cache holds one replica, and it does not batch products.
    """
    return jax.default_backend() == "cpu"


# ---- the chunked loss


def chunk_size(vocab_size: int, platform: str | None = None) -> int:
    """Positions of a chunk: as many as 512 (GPU), 256 (TPU) or 128 (CPU) MiB of logits hold.

    An accelerator reads and writes the gradient of the head, ``[D, V]`` in float32, once per chunk, so few large chunks
    are better. Above 1024 positions the products take longer than that traffic. A CPU takes 256 or 512.

    Args:
      vocab_size: columns of the head on one device.
      platform: ``cpu``, ``gpu`` or ``tpu``; None: the default backend.
    """
    platform = platform or jax.default_backend()
    logits, least, most = {"cpu": (2**25, 256, 512), "tpu": (2**26, 128, 1024)}.get(platform, (2**27, 128, 1024))
    return int(np.clip(2 ** round(math.log2(logits / vocab_size)), least, most))


def loss_rows(size: int, vocab_size: int, platform: str) -> int:
    """Rows of a chunk that the loss reads at a time: on a CPU a divisor of ``size``, at least 8; otherwise ``size``.

    The products want a whole chunk. The loss and its gradient are a dozen passes over the logits and want a cache.
    """
    if platform != "cpu":
        return size
    rows = math.gcd(size, max(8, 2 ** int(math.log2(CPU_LOGITS / vocab_size))))
    return rows if rows >= 8 else size


def sum_in_float32(platform: str) -> bool:
    """Whether arrays are widened before a sum over a mesh: XLA:CPU aborts on a sum of bfloat16."""
    return platform == "cpu"


# ---- compiling and running


def compiler_options() -> dict[str, int] | None:
    """Options for ``jax.jit``: on a CPU LLVM's second level, unless ``XLA_FLAGS`` names one.

    Its programs are as fast as those of the default level and compile sooner.
    """
    named = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return None if named or jax.default_backend() != "cpu" else {"xla_backend_optimization_level": 2}


def ends_in_call() -> bool:
    """Whether a compiled program has ended when its call returns (after ``keep_memory``)."""
    return jax.default_backend() == "cpu" and not jax.config.read("jax_cpu_enable_async_dispatch")


def keep_memory() -> bool:
    """Keeps freed memory in the process where JAX has nothing but the CPU. Returns whether it does.

    XLA allocates the arrays of a step anew in every step. glibc returns what is freed to the system, which clears every
    page before it hands it out again. With one arena, no ``mmap`` for single arrays and no trimming, the process
    reuses its pages and stays as large as it ever was.

    The call must come before JAX starts its threads. It changes nothing where the environment chooses a number of
    arenas, or without glibc. It suits large steps: XLA's compiling threads share the arena and take longer.
    """
    chosen = "arena_max" in os.environ.get("GLIBC_TUNABLES", "") or "MALLOC_ARENA_MAX" in os.environ
    if chosen or entry_points(group="jax_plugins") or find_spec("libtpu"):
        return False
    arena_max, trim_threshold, mmap_max = -8, -1, -4  # as malloc.h numbers them
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all([mallopt(arena_max, 1), mallopt(trim_threshold, -1), mallopt(mmap_max, 0)]):
        return False
    # A step dispatched to another thread counts as done before its memory is free. A next step that starts earlier
    # than that would allocate fresh memory, which stays too.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def device_bytes() -> int:
    """Memory of the first device in bytes; on a CPU its share of the host's memory; 0 where it is unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def worker_processes() -> int:
    """Processes among which independent small trainings are shared: one a core on a CPU; 0 (none) elsewhere."""
    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 0
