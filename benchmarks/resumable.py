"""Rows of a study in one JSON file: what is there is not measured again, and every new row is written at
once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """``rows[key]`` of a file. Raises ``ValueError`` where the file's rows were measured with other
    settings."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[str, Row] = {}
        if path.exists():
            document = json.loads(path.read_text())
            if document["settings"] != settings:
                raise ValueError(
                    f"{path} has rows measured with {document['settings']}, not {settings}: move it away"
                )
            self.rows = document["rows"]

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row called ``key``, measured where it is not there, with the seconds it took."""
        if key not in self.rows:
            started = time.monotonic()
            row = measure()
            self.rows[key] = {**row, "seconds": round(time.monotonic() - started, 1)}
            self._write()
            print(f"{key}: {self.rows[key]['seconds']} s", flush=True)
        return self.rows[key]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({"settings": self.settings, "rows": self.rows}) + "\n")
        os.replace(part, self.path)
