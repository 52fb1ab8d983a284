"""REPRODUCE.md: a page of sections, each written by one command."""

import os
import platform
import re
import subprocess
from pathlib import Path

import jax


def write_section(page: Path, section: str) -> None:
    """Writes a section, which starts with ``## heading``, into a page; replaces the section with the same heading."""
    old = page.read_text() if page.exists() else "# Reproduced numbers\n"
    first, *parts = re.split(r"^(?=## )", old, flags=re.M)
    heading = section.partition("\n")[0]
    same = [part.partition("\n")[0] == heading for part in parts]
    parts = [section if here else part for here, part in zip(same, parts, strict=True)]
    parts += [] if any(same) else [section]
    page.write_text("\n\n".join(part.strip() for part in (first, *parts)) + "\n")


def made_on() -> str:
    """Line with the machine, the version of JAX and the commit that made a section."""
    return f"Made on {_machine()}; jax {jax.__version__}; commit {_commit()}"


def _machine() -> str:
    device = f"{jax.device_count()} {jax.devices()[0].platform} device"
    return f"{device} ({os.cpu_count()} cores, {platform.machine()}), Python {platform.python_version()}"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
