"""The sheets of pictures that a run leaves beside its results file, as the page shows them."""

from __future__ import annotations

import base64

from lab.study.results import ResultsFile

MOST_SETTINGS = 6  # whose sheets are shown, the most accurate ones: a sheet takes some 150 kB
MOST_BYTES = 4 * 2**20  # of a sheet; the lab's are far smaller


def sheet(run: ResultsFile, name: str) -> str | None:
    """The sheet <results file>.<name>.png as an image's address; None where there is none."""
    path = run.path.with_suffix(f".{name}.png")
    try:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return None
    return (
        f"data:image/png;base64,{base64.b64encode(data).decode()}"
        if data.startswith(b"\x89PNG")
        else None
    )
