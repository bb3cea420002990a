"""A slice of `raw_calls.py`: nonsense for every op is served, or refused unwritten, and the process lives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sinkprune.ops import native


@pytest.mark.skipif(not native.available(), reason=f"no extension: {native.why_not()}")
def test_nonsense_for_the_ops_neither_kills_the_process_nor_writes_before_it_is_refused() -> None:
    command = [sys.executable, Path(__file__).with_name("raw_calls.py"), "--calls", "450", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == [], done.stderr
