"""Atomic replacement of a folder: its files stay unchanged until all new ones are written."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from distill.errors import UserError


def there(folder: Path) -> Path:
    """The folder, or its previous files if a process was killed between the two renames of ``replacing``.

    Example:
      >>> there(Path("nowhere"))
      PosixPath('nowhere')
    """
    before = _beside(folder, "before")
    return before if not folder.exists() and before.is_dir() else folder


@contextlib.contextmanager
def replacing(folder: Path, size: int, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yields an empty folder that replaces ``folder`` when the block ends without an error.

    It is ``.NAME.partial`` beside ``folder``. At the end, old files that the block has not written and that are not
    stale are linked into it; then ``folder`` is renamed ``.NAME.before``, the new folder is renamed ``folder``, and the
    old one is deleted.

    Args:
      folder: made if there is none.
      size: bytes that will be written, roughly.
      stale: whether an old file of this name is dropped.

    Raises:
      UserError: too little room, or a target that cannot be written or renamed; ``folder`` is as it was.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder, or the name of a new one.")
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder}: is or holds the current folder and cannot be replaced; expected another one.")
    partial, before = _beside(folder, "partial"), _beside(folder, "before")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if there(folder) == before:
            os.replace(before, folder)
        _empty(partial, size)
        yield partial
        _open_to_others(partial)
        if folder.exists():
            _keep(folder, partial, stale)
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        try:
            os.replace(partial, folder)
        except OSError:
            if before.exists():
                os.replace(before, folder)
            raise
    except OSError as error:
        raise UserError(
            f"{folder}: not written ({error}); what it held is as it was. Free some space, or choose a folder that can "
            "be written, as can the one around it; then save again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.{what}"


def _empty(partial: Path, size: int) -> None:
    """Makes the folder. Raises OSError on a disk with fewer free bytes than ``size``."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    free = shutil.disk_usage(partial).free
    if free < size:
        raise OSError(f"the disk is full: {free} bytes free, {size} needed")


def _open_to_others(partial: Path) -> None:
    """Gives new files the permissions that the umask says: safetensors writes files for their owner alone."""
    allowed = partial.stat().st_mode & 0o666  # the folder was made under the same umask
    for path in partial.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(allowed)


def _keep(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    def left_out(place: str, names: list[str]) -> list[str]:
        here = Path(place).relative_to(old)
        written = [name for name in names if (new / here / name).exists() and not (new / here / name).is_dir()]
        return written + [name for name in names if Path(place) == old and stale(name)]

    shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
