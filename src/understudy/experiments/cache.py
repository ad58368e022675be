"""What is expensive is made once: folders named by a hash of what they are made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.checkpoints import flush_tree, write_json


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for ``content`` (JSON types)."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """A folder of folders. Whatever is under ``root`` may be deleted: it is made again when asked for."""

    root: Path

    def folder(self, kind: str, key: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """``<root>/<kind>/<digest of key>``, which ``make`` fills if it is not there; ``key.json`` in it is ``key``.

        A folder appears when it is complete. Of two processes that want it, one makes it and the other waits.
        """
        final = self.root / kind / digest(key)
        if final.exists():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with final.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.exists():
                partial = final.with_suffix(".partial")
                with suppress(FileNotFoundError):
                    shutil.rmtree(partial)  # of a process that was killed
                partial.mkdir()
                make(partial)
                write_json(partial / "key.json", key)
                flush_tree(partial)
                partial.rename(final)
        return final
