"""One process at a time in a folder, and no lock on a file that is gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from understudy import locking
from understudy.locking import LOCK_FILE, is_held, lock_folder


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with lock_folder(folder), pytest.raises(BlockingIOError):
        lock_folder(folder)
    lock_folder(folder).close()
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_that_went_away_while_the_lock_was_taken(
    made_anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends, and removes the folder it wrote nothing in, between our opening and our locking."""
    own, taken = locking.fcntl.flock, list[int]()

    def flock(file: IO[str], operation: int) -> Any:
        taken.append(os.fstat(file.fileno()).st_ino)
        if len(taken) == 1:
            shutil.rmtree(tmp_path / "run")
            if made_anew:
                (tmp_path / "run").mkdir()
                (tmp_path / "run" / LOCK_FILE).touch()
        return own(file, operation)

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    with lock_folder(tmp_path / "run") as lock:
        assert len(taken) == 2
        assert (tmp_path / "run" / LOCK_FILE).stat().st_ino == os.fstat(lock.fileno()).st_ino


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        lock_folder(tmp_path / "file" / "run")


def test_a_lock_tells_whether_somebody_is_at_work(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with lock_folder(tmp_path):
        assert is_held(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    assert not is_held(tmp_path)
    # A process that is killed lets go too.
    hold = "import sys, time; from pathlib import Path; from understudy.locking import lock_folder; "
    hold += "lock = lock_folder(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert is_held(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not is_held(tmp_path)


def test_whoever_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    looking = (tmp_path / LOCK_FILE).open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    gone = threading.Timer(0.03, looking.close)
    gone.start()
    start = time.monotonic()
    lock_folder(tmp_path).close()
    assert time.monotonic() - start >= 0.02
    gone.join()
