"""Rows of a study in one JSON file: what is there is not measured again, and every new row is written at
once. Several processes may add to one file."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sinkprune.files import write_whole

Row = dict[str, Any]


class Rows:
    """``rows[key]`` of a file. Raises ``ValueError`` where the file's rows were measured with other
    settings."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows = self._read()

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row called ``key``, measured where it is not there, with the seconds it took."""
        if key not in self.rows:
            started = time.monotonic()
            row = measure()
            self.rows[key] = {**row, "seconds": round(time.monotonic() - started, 1)}
            with self._alone():
                self.rows = self._read() | {key: self.rows[key]}
                self._write()
            print(f"{key}: {self.rows[key]['seconds']} s", flush=True)
        return self.rows[key]

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        document = json.loads(self.path.read_text())
        if document["settings"] != self.settings:
            raise ValueError(
                f"{self.path} has rows measured with {document['settings']}, not {self.settings}: "
                "move it away"
            )
        rows: dict[str, Row] = document["rows"]
        return rows

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process adds a row meanwhile: they wait for the folder's lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _write(self) -> None:
        write_whole(self.path, json.dumps({"settings": self.settings, "rows": self.rows}) + "\n")
