"""Folders and files that are complete or not there: a kill at any instant leaves the old content or the new one."""

import glob
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(final: Path) -> Generator[Path]:
    """Fill a folder next to `final` and give it the name `final` in one rename when the block ends well.

    The block writes into `tmp_<name>`; it is flushed to the disk before the rename. If the block raises, nothing of it
    remains. A `final` that exists is replaced; a process killed between the two renames that this takes leaves it as
    `old_<name>`, which `recover_folders` puts back.

    Args:
        final: the folder to create or replace. Only one process at a time may write it.

    Yields:
        The empty folder to write into.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folders(final.parent, glob.escape(final.name))
    work, old = final.with_name(f"tmp_{final.name}"), final.with_name(f"old_{final.name}")
    work.mkdir()
    try:
        yield work
        _flush(work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if final.exists():
        final.rename(old)
    work.rename(final)
    _sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def recover_folders(parent: Path, name: str = "*") -> None:
    """Undo what a killed `atomic_folder` left in `parent`: unfinished folders go, a displaced one comes back.

    Args:
        parent: the folder in which `atomic_folder` was at work.
        name: name (or glob pattern) of the final folders to look after.
    """
    for old in parent.glob(f"old_{name}"):
        final = old.with_name(old.name.removeprefix("old_"))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for unfinished in parent.glob(f"tmp_{name}"):
        shutil.rmtree(unfinished)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 beside `path`, flush it to disk and rename it into place; parent folders are made.

    Raises:
        OSError: the folder cannot be written; the previous content of `path` is untouched.
    """
    write_bytes_atomically(path, text.encode("utf-8", errors="replace"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to disk and rename it into place; parent folders are made.

    Raises:
        OSError: the folder cannot be written; the previous content of `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _flush(folder: Path) -> None:
    """Force every file and folder below `folder` onto the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
