"""Who may write in a folder: one process at a time, and none for longer than it lives."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


def lock_folder(folder: Path) -> IO[str]:
    """Make ``folder`` where it is not there, and hold its lock until what is returned is closed, or the process dies.

    Raises BlockingIOError while another process holds it, OSError where nothing can be written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK_FILE
        try:
            lock = path.open("w", encoding="utf-8")
        except FileNotFoundError:
            # A run that ended without having written anything took its folder away between the two calls.
            if folder.is_dir():
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, lock):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _is_still(path: Path, lock: IO[str]) -> bool:
    """Whether ``path`` is the file that is locked: it may have been removed, and made anew, before the lock was had."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False
