"""Reads an offline W&B run back, value by value: LevelDB-style blocks that hold wandb's own protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, LAST = 1, 4


def offline_run(folder: Path, patience: float = 10.0) -> OfflineRun:
    """The finished run in a folder; waits for it, since ``finish()`` may return before the file is complete."""
    give_up = time.monotonic() + patience
    while True:
        found = OfflineRun(folder)
        if found.exit_code is not None or time.monotonic() > give_up:
            return found
        time.sleep(0.02)


def payloads(data: bytes) -> Iterator[bytes]:
    """The payload of every record; a record may span several blocks."""
    position, parts = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += RECORD_HEADER
        if position + length > len(data):
            return  # still being written
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def put(target: dict[str, Any], item: Any) -> None:
    """Stores one item of wandb's, whose key is a word or a path, in a nested dict."""
    *path, last = list(item.nested_key) or [item.key]
    for key in path:
        target = target.setdefault(key, {})
    target[last] = json.loads(item.value_json)


class OfflineRun:
    """Rows of history, config, summary, metric definitions and exit code of one offline run."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        (file,) = folder.glob("*.wandb")
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        self.exit_code: int | None = None
        self.name = self.group = self.project = self.text = ""
        for payload in payloads(file.read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            self.text += str(record)
            kind = record.WhichOneof("record_type")
            getattr(self, f"_{kind}", lambda _: None)(getattr(record, kind))

    def _history(self, history: Any) -> None:
        row: dict[str, Any] = {"_step": history.step.num}
        for item in history.item:
            put(row, item)
        self.rows.append(row)

    def _run(self, run: Any) -> None:
        self.name, self.group, self.project = run.display_name, run.run_group, run.project
        self._config(run.config)

    def _config(self, config: Any) -> None:
        for item in config.update:
            put(self.config, item)

    def _summary(self, summary: Any) -> None:
        for item in summary.update:
            put(self.summary, item)

    def _metric(self, metric: Any) -> None:
        self.metrics[metric.name or metric.glob_name] = metric.step_metric

    def _exit(self, ending: Any) -> None:
        self.exit_code = ending.exit_code

    def column(self, key: str) -> list[tuple[int, Any]]:
        """``(W&B step, value)`` of every row that has the key."""
        return [(row["_step"], row[key]) for row in self.rows if key in row]
