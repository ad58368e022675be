"""What Weights & Biases has written, without its server."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> list[Any]:
    """All of a session's records: its own process writes them, and may be a little behind."""
    end = time.monotonic() + 60
    while not (records := wandb_log(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < end
        time.sleep(0.1)
    return records


def wandb_log(path: Path) -> list[Any]:
    """A log of protocol buffers in LevelDB's format: blocks of 32 KiB, parts with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    data, place, buffer, records = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a block's end has no room for another head
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        buffer += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            records.append(wandb_internal_pb2.Record.FromString(buffer))
            buffer = b""
    return records


def wandb_losses(records: list[Any]) -> Mapping[int, float]:
    found = {}
    for record in records:
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "optim/loss" in items:
                found[int(items["_step"])] = items["optim/loss"]
    return found
