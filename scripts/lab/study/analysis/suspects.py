"""The pictures whose labels may be wrong, as the page shows them."""

from __future__ import annotations

from lab.study.analysis.sheets import MOST_SETTINGS, sheet
from lab.study.analysis.study import Study


def suspects(study: Study) -> list[tuple[str, str, str, str]]:
    """(setting, file of its newest run, its sheet as an image's address, how many labels are
    suspected), of the most accurate settings with one.
    """
    runs = ((name, study.newest[name]) for name in study.table.index)
    found = ((name, run.path.name, sheet(run, "suspected"), run.suspected) for name, run in runs)
    return [each for each in found if each[2] is not None][:MOST_SETTINGS]
