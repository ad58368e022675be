"""samples.jsonl: what `generate` writes, piece by piece, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.checkpoints import jsonl, writing


class SampleFile:
    """Rows grow in ``samples.partial.jsonl``, which becomes ``samples.jsonl`` when all are there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "samples.jsonl"
        self._partial = folder / "samples.partial.jsonl"

    @property
    def finished(self) -> bool:
        """Whether every row is there."""
        return self.path.exists()

    def keep_whole_pieces(self, rows_per_piece: int, num_rows: int) -> int:
        """Cut off what a crash left of an unfinished piece; how many rows remain of ``num_rows``.

        Only whole pieces: a piece decodes together, and another composition would round differently.
        """
        whole = _whole_lines(self._partial) if self._partial.exists() else []
        kept = num_rows if len(whole) >= num_rows else len(whole) - len(whole) % rows_per_piece
        if whole:
            os.truncate(self._partial, sum(map(len, whole[:kept])))
        return kept

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a piece and force it to disk. Raises RunError when it cannot be written."""
        with writing(self._partial), self._partial.open("ab") as file:
            file.write(jsonl(rows).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name."""
        self._partial.replace(self.path)

    def num_rows(self) -> int:
        """Rows of the finished file."""
        return len(_whole_lines(self.path))


def _whole_lines(path: Path) -> list[bytes]:
    """The lines up to the first that is not whole."""
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break
            lines.append(line)
    return lines
