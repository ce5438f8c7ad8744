"""The runs of a sweep: each config with each point, as it was read, under its id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from lab.base.errors import RequestError
from lab.base.files import replace_text, sibling
from lab.base.reading import read_config
from lab.config.grid import check_keys
from lab.config.loading import Config, load_config, run_id
from lab.study.cli import hand_on, option


@dataclass(frozen=True)
class Planned:
    """One run of the sweep. Where the request for it is wrong, `config` is None and `error` says
    why.
    """

    id: str
    path: str  # of the config file
    overrides: tuple[str, ...]
    name: str  # the file and the overrides that tell this run from the others
    config: Config | None
    error: str | None = None
    twin: bool = False  # followed by a time-matched baseline
    resume: bool = False  # from its own checkpoint, if there is one
    text: str = ""  # of the config file, as it was read
    copy: Path | None = (
        None  # what the run reads instead of the file, see `hand_over`; None: the file
    )
    processes: int = 1  # each on a GPU of its own

    def complaint(self) -> str:
        """The `error`, with the run's name before it unless it names an override of all runs."""
        why = self.error.removeprefix(f"{self.path}: ")  # the name begins with it
        named = next(
            (text for text in self.overrides if why.startswith(f"override {text!r}: ")), None
        )
        if (
            named is not None
            and not f"{self.name} ".endswith(f" {named} ")
            and f" {named} " not in self.name
        ):
            return why
        return f"{self.name}: {why if named is None else why.removeprefix(f'override {named!r}: ')}"


def plan_runs(
    configs: Sequence[str],
    common: Sequence[str],
    points: Sequence[tuple[str, ...]],
    dense_twin: bool,
    resume: bool,
    check: Callable[[Config], None] | None = None,
    imports: Sequence[str] = (),
) -> list[Planned]:
    """Every config file with every point of the sweep; a run that is asked for twice is planned
    once.

    common: overrides of all runs; points: those of one run each (`cross`); check, imports: as for
    `load_config`. Raises RequestError for a wrong override in `common`, a request wrong for every
    run, `dense_twin` without a sparse run.
    """
    check_keys(common)
    texts = {path: read_once(path) for path in dict.fromkeys(configs)}
    plans: dict[str, Planned] = {}
    for path, own in product(configs, points):
        plan = plan_run(
            path,
            texts[path],
            (*common, *own),
            " ".join([path, *own]),
            dense_twin,
            resume,
            check,
            imports,
        )
        plans.setdefault(plan.id, plan)
    if all(plan.error for plan in plans.values()):
        first = next(iter(plans.values()))
        none = f"; none of {len(plans)} runs can start" if len(plans) > 1 else ""
        raise RequestError(first.complaint() + none)
    if dense_twin and not any(plan.twin for plan in plans.values()):
        raise RequestError("--dense-twin: none of the runs is sparse")
    return list(plans.values())


def read_once(path: str) -> str | RequestError:
    """The text of a config file, or what is wrong with it."""
    try:
        return read_config(path)
    except RequestError as error:
        return error


def plan_run(
    path: str,
    text: str | RequestError,
    overrides: tuple[str, ...],
    name: str,
    dense_twin: bool,
    resume: bool = False,
    check: Callable[[Config], None] | None = None,
    imports: Sequence[str] = (),
) -> Planned:
    """One run. `text`: what reading the config file gave. Nothing is raised: what is wrong is the
    plan's `error`.
    """
    try:
        if isinstance(text, RequestError):
            raise text
        config = load_config(path, overrides, text, check, imports)
    except RequestError as error:
        return Planned(digest(name), path, overrides, name, None, str(error))
    key = run_id(config)
    twin = dense_twin and config.ast.mode != "dense"
    if config.logging.jsonl_path is not None:  # each run gets a log of its own
        overrides += (f"logging.jsonl_path={sibling(config.logging.jsonl_path, key)}",)
    return Planned(key, path, overrides, name, config, None, twin, resume, text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def hand_over(plans: Sequence[Planned], folder: Path) -> list[Planned]:
    """`plans`, each with a copy in `folder` of its config file as it was read.

    The runs read the copy: a pipe cannot be read again, and a file may change before its last run
    starts. A plan whose request is wrong stays as it is.
    """
    handed = []
    for plan in plans:
        if plan.error is not None:
            handed.append(plan)
            continue
        ending = ".json" if plan.path.lower().endswith(".json") else ".yaml"
        copy = folder / f"{Path(plan.path).stem}.{digest(plan.text)}{ending}"
        if not copy.exists():
            replace_text(copy, plan.text)
        handed.append(replace(plan, copy=copy))
    return handed


def arguments_for(plan: Planned) -> list[str]:
    """The command line of run_experiment.py for this run."""
    flags = ["--dense-twin"] * plan.twin + ["--resume", "auto"] * plan.resume
    if plan.processes > 1:
        flags += ["--nproc", str(plan.processes)]
    code = hand_on(plan.config.imports if plan.config else ())
    return [*option("--config", str(plan.copy or plan.path)), *code, *flags, *plan.overrides]
