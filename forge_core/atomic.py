"""Files and folders that are either complete or absent, whatever kills the process while they are written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MARK = ".tmp-"


def fsync_path(path: Path) -> None:
    """Flush one file, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends without an error it takes the place of `path`.

    The folder is created. An error leaves `path` as it was and removes the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}{_MARK}", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private; the result is an ordinary file
        fsync_path(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; when the block ends without an error it takes the place of `path`.

    A folder that stands at `path` is replaced as a whole: for a moment between two renames `path` is absent, never
    half old and half new. An error leaves `path` as it was and removes the temporary folder.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=target.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        allowed = ~_umask()
        for entry in [temporary, *sorted(temporary.rglob("*"))]:
            entry.chmod((0o777 if entry.is_dir() else 0o666) & allowed)  # some writers make private files
            fsync_path(entry)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writers of `atomic_file` and `atomic_directory` left in `folder`; return the removed paths.

    Only to be called where nobody else writes: a live writer's temporary would be removed too.
    """
    removed = []
    for entry in sorted(Path(folder).glob(f".*{_MARK}*")):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        removed.append(entry)
    return removed
