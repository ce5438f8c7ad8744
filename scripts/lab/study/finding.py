"""The trained network that a command is asked about: a weights folder, or the run that left it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.base.errors import RequestError, one_line
from lab.config.imports import options_beside
from lab.study.results import RESULTS, finished_at

LATEST = "latest"


class Found(NamedTuple):
    """A weights folder, and the results file of its run where there is one."""

    weights: str
    path: Path | None = None
    result: dict[str, Any] | None = None


def find_run(text: str) -> Found:
    """What `--weights` means: a weights folder, the folder of a run above it, a results file, or
    `latest` in a results folder (alone: in `results`).

    Whether a weights folder is one is left to whoever reads it. Raises RequestError naming
    --weights where nothing is there, where a results file has no weights, and where a results
    folder has no run with some.
    """
    place = Path(text)
    if place.name == LATEST and not place.exists():
        folder = place.parent if len(place.parts) > 1 else Path("results")
        return _latest(folder, text)
    if place.suffix == ".json" and place.is_file():
        found = _of_results(place)
        if found is None:
            raise RequestError(f"--weights: {text}: no results file of a run that left weights")
        return found
    if not (place / "weights").is_dir():
        if next(place.glob(RESULTS), None) is not None:
            raise RequestError(
                f"--weights: {text}: a results folder; its newest run: {text}/latest"
            )
        if not place.exists():
            raise RequestError(
                f"--weights: {text}: no such file or folder; expected a weights folder, the "
                f"folder of a run, a results file, or latest in a results folder"
            )
        return _with_results(place, text)
    return _with_results(place / "weights", str(place / "weights"))


def _latest(folder: Path, text: str) -> Found:
    found = _newest(_runs(folder.glob(RESULTS)))
    if found is None:
        raise RequestError(f"--weights: {text}: no results file in {folder} of a run with weights")
    return found


def _with_results(weights: Path, text: str) -> Found:
    """A weights folder with the newest results file that names it, <output_dir>/final_results_*,
    beside its <output_dir>/checkpoints/<run>/weights.
    """
    found = _run_of(weights)
    return Found(text) if found is None else found._replace(weights=text)


def finished_run(folder: Path) -> Found | None:
    """The run with this checkpoint folder, where it came to its end; None where it did not, or is
    not there. folder: <output_dir>/checkpoints/<run>.
    """
    found = _run_of(folder / "weights")
    ended = found is not None and found.result.get("status") in ("completed", "early_stopped")
    return found if ended else None


def _run_of(weights: Path) -> Found | None:
    """The newest results file that names a weights folder."""
    whole = weights.absolute()
    folder = whole.parent.parent.parent
    return _newest(
        run for run in _runs(folder.glob(RESULTS)) if Path(run.weights).absolute() == whole
    )


def _runs(paths: Iterable[Path]) -> list[Found]:
    return [run for run in map(_of_results, paths) if run is not None]


def _of_results(path: Path) -> Found | None:
    """The run of a results file, where that is one and its weights are there."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        weights = path.parent / result["weights"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return Found(str(weights), path, result) if weights.is_dir() else None


def _newest(runs: Iterable[Found]) -> Found | None:
    def age(run: Found) -> tuple[float, int, str]:
        environment = run.result.get("environment") or {}
        name = run.path.stem.removeprefix("final_results_")
        return finished_at(environment.get("finished_utc"), name)

    return max(runs, key=age, default=None)


def config_of(found: Found, imports: Sequence[str] = ()) -> str:
    """The config of a run as JSON, as `load_config` takes it, without its imports. Raises
    RequestError where there is none, and where it has imports and nobody names any: code that comes
    with weights is not run by itself.
    """
    config = None if found.result is None else found.result.get("config")
    if not isinstance(config, dict):
        place = one_line(found.weights)
        raise RequestError(
            f"--config: needed for the validation set, because no results file of the run is "
            f"beside {place}. For single pictures give --images"
        )
    own = config.get("imports")
    if own and not imports:
        place = one_line(found.weights)
        raise RequestError(
            f"--weights: {place}: its run imports code, which is not run by itself; if you trust "
            f"it, add {options_beside(Path(found.weights))}"
        )
    return json.dumps({key: value for key, value in config.items() if key != "imports"})
