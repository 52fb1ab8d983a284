"""The command line of every script: ``--config``, ``--run``, ``--debug``, typed overrides, exit codes.

Exit 0: done, or stopped on request and saved. 2: the user's mistake, one message on stderr. 1: anything else.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill.devices import processes
from distill.errors import UserError, overriding

_LOST = (
    "\nIf another process ended, its log says why. The same command goes on from the last checkpoint, on another "
    "number of processes or devices too."
)
_INTERRUPTED = 128 + signal.SIGINT
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser that shows a script's docstring and knows ``--debug``."""
    arguments = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return arguments


def parse_config(doc: str, argv: Sequence[str], **extra: Any) -> tuple[argparse.Namespace, Any]:
    """``--config NAME --run DIR`` and overrides such as ``--student.model.layers 1``; ``--profile``: ``--log.profile``.

    Args:
      doc: the script's docstring.
      argv: the arguments.
      **extra: further options, ``name=(default, choices, help)``.

    Returns:
      The options and the configuration with its overrides.
    """
    import tyro

    from distill.config import load_config

    options = parser(doc)
    names = "name in distill/configs, or a .py file (default: addition)"
    options.add_argument("--config", default="addition", help=names)
    options.add_argument("--run", type=Path, help="run folder (default: runs/CONFIG)")
    for name, (default, choices, text) in extra.items():
        options.add_argument(f"--{name}", default=default, choices=choices, help=text)
    options.epilog = "Every field of the configuration can be overridden; --config-help lists them."
    options.add_argument("--config-help", action="store_true", help="list the fields of the configuration")
    known, overrides = options.parse_known_args(argv)
    config = load_config(known.config)
    overrides = ["--log.profile" if one == "--profile" else one for one in overrides]
    if known.config_help:
        overrides = ["--help"]
    with overriding(config):
        config = tyro.cli(type(config), default=config, args=overrides, prog="overrides", description="Configuration")
    known.run = known.run or Path("runs") / Path(known.config).stem
    return known, config


def compile_cache() -> Path:
    """Where compiled programs are kept: ``$XDG_CACHE_HOME/distill/xla``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "xla"


def set_up_jax(*, keep: bool = False) -> None:
    """Joins the processes, if there are several (``distill/devices/processes.py``), before anything else.

    Compiled programs are kept in ``compile_cache()`` and reused by later runs; with ``keep``, freed memory is kept too
    (``backend.keep_memory``).
    """
    import jax

    if keep:
        from distill.devices import backend

        backend.keep_memory()
    processes.start()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(compile_cache()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a script's ``main(argv)`` and turns what it raises into exit codes and one message."""
    from distill.train import Stopped

    argv = sys.argv[1:]
    try:
        main(argv)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        if "--debug" in argv and processes.count() == 1:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        if processes.count() > 1 and not isinstance(error, Stopped):
            processes.abort(code, f"process {processes.index()}: {message}{_LOST if code == 1 else ''}")
        print(message, file=sys.stderr)
        sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error.

    0: SIGTERM, state saved. 130: Ctrl-C, as of every command. 2: what was given cannot be used (``UserError``, a file
    that the system refuses). 1: everything else, a fault of the library or of the machine.
    """
    from distill.train import Stopped

    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted; what was saved before is in the run folder."
    if isinstance(error, Stopped):
        return _INTERRUPTED if error.by == signal.SIGINT else 0, str(error)
    written = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore says it
    if (error.errno if isinstance(error, OSError) else written and int(written[1])) in _DISK_FULL:
        return 2, f"error: the disk is full ({error}). Nothing saved was lost: free some space, run the command again."
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return 2, f"error: {error}"
    return 1, f"error: {type(error).__name__}: {error} (--debug shows where)"
