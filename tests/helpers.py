"""Helpers of several test files."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------- Processes


def processes(word: str) -> list[int]:
    """The ids of the processes with `word` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"\0{word}\0" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value
