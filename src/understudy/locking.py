"""Who may write in a folder: one process at a time, and none for longer than it lives."""

from __future__ import annotations

import fcntl
import os
import time
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
            _take(lock)
            if _is_still(path, lock):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock. The system takes it from one that is killed."""
    try:
        lock = (folder / LOCK_FILE).open("rb")
    except FileNotFoundError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _take(lock: IO[str]) -> None:
    for _ in range(5):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # whoever only looks (``is_held``) is gone again
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still(path: Path, lock: IO[str]) -> bool:
    """Whether ``path`` is the file that is locked: it may have been removed, and made anew, before the lock was had."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False
