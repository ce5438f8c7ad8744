"""The pictures whose labels may be wrong, as the page shows them."""

from __future__ import annotations

import base64

from lab.analysis.study import Study
from lab.results import ResultsFile

MOST_SETTINGS = 6  # that are shown, the most accurate ones: a sheet takes some 150 kB
MOST_BYTES = 4 * 2**20  # of a sheet; the lab's are far smaller


def sheet(run: ResultsFile) -> str | None:
    """The pictures that a run has left beside its results file, as an image's address; None where there are none."""
    path = run.path.with_suffix(".suspected.png")
    try:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}" if data.startswith(b"\x89PNG") else None


def suspects(study: Study) -> list[tuple[str, str, str]]:
    """(setting, file of its newest run, its sheet as an image's address), of the most accurate settings with one."""
    runs = ((name, study.newest[name]) for name in study.table.index)
    found = ((name, run.path.name, sheet(run)) for name, run in runs)
    return [each for each in found if each[2] is not None][:MOST_SETTINGS]
