"""Run many configs, each run in a process of its own, and list how each ended.

    python scripts/run_sweep.py --configs configs/imagenet_resnet50_ast.yaml \\
        configs/imagenet_vitb16_ast.yaml
    python scripts/run_sweep.py --configs configs/digits_smoke.yaml --seeds 0 \\
        --grid ast.mode=ast,random ast.target_activation=0.1,0.25,0.5
    python scripts/run_sweep.py --configs configs/cifar10_resnet18_ast.yaml \\
        --one-process --seeds 0 1 2 --variants \\
        "ast.mode=dense training.epochs=15" "ast.mode=ast" "ast.mode=random"

A run that fails is listed with its reason, and the others go on. A run that
ends adds a line to <output_dir>/sweep_summary_<timestamp>.jsonl; what it
printed is in <output_dir>/logs/. Ctrl-C and SIGTERM are passed on to the runs,
which save what they have; a second one kills them.
Exit codes: 0 all done; 1 a run failed; 2 a wrong request; 130, 143 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run_experiment
from lab.base.errors import RequestError
from lab.base.files import append_jsonl, locked, require_folder, user_text
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.config.grid import as_overrides, cross, is_override
from lab.study.cli import add_import, command_parser, run_cli
from lab.study.sweep import (
    Halt,
    Planned,
    as_written,
    finished_runs,
    hand_over,
    is_done,
    open_summary,
    plan_row,
    plan_runs,
    row_line,
    show_plan,
    slots_of,
    time_left,
    work_off,
    work_off_here,
)

RUNNER = Path(__file__).with_name("run_experiment.py")


OPTIONS: dict[str, dict[str, Any]] = {  # of the command line, by name
    "--configs": {
        "required": True,
        "nargs": "+",
        "metavar": "FILE",
        "help": "configs, run in this order",
    },
    "--grid": {"nargs": "+", "metavar": "KEY=V1,V2", "help": "run every combination of these"},
    "--variants": {
        "nargs": "+",
        "metavar": '"KEY=V .."',
        "help": "run each with each set of overrides",
    },
    "--seeds": {"nargs": "+", "metavar": "N", "help": "repeat each with these seeds"},
    "--gpus": {"nargs": "+", "metavar": "N", "help": "GPUs to use; default: as torch chooses"},
    "--runs-per-gpu": {"type": int, "metavar": "N", "help": "runs at a time on each (default 1)"},
    "--one-process": {
        "action": "store_true",
        "help": "run one after the other in this process, which keeps what is decoded and "
        "compiled; if a run takes it down, --resume runs the others",
    },
    "--dense-twin": {
        "action": "store_true",
        "help": "after each sparse run a dense one of the same time",
    },
    "--resume": {"action": "store_true", "help": "skip finished runs, go on with interrupted ones"},
    "--dry-run": {"action": "store_true", "help": "print the plan and its time, and stop"},
    "--output-dir": {"metavar": "DIR", "help": "short for logging.output_dir=DIR in every run"},
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    add_import(parser)
    parser.set_defaults(grid=[], variants=[], seeds=[], gpus=[], runs_per_gpu=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over every config")
    args = parser.parse_intermixed_args(argv)
    # in `--configs a.yaml training.lr=1` the option takes the override too
    for name in ("configs", "seeds", "gpus"):
        values = getattr(args, name)
        args.overrides += [value for value in values if is_override(value)]
        setattr(args, name, [value for value in values if not is_override(value)])
    args.configs = [user_text(path) for path in args.configs]
    if args.output_dir is not None:
        args.overrides += as_overrides({"logging.output_dir": args.output_dir}, args.overrides)
    if args.one_process and (args.gpus or args.runs_per_gpu != 1):
        raise RequestError("--one-process: one run at a time; leave out --gpus and --runs-per-gpu")
    if args.runs_per_gpu < 1:
        raise RequestError(f"--runs-per-gpu: expected at least 1, got {args.runs_per_gpu}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    forget_launch()
    points = cross(args.grid, args.variants, args.seeds, args.overrides)
    check = run_experiment.check_config
    plans = plan_runs(
        args.configs, args.overrides, points, args.dense_twin, args.resume, check, args.imports
    )
    if args.one_process and len(plans) > 1:
        refuse_shared_graphs(plans)
    slots = slots_of(args.gpus, args.runs_per_gpu)
    output_dir = Path(next(plan.config for plan in plans if plan.config).logging.output_dir)
    finished = as_written(output_dir, finished_runs(plans))
    done = [plan.id for plan in plans if args.resume and is_done(plan, finished.get(plan.id))]
    if args.dry_run:
        return show_plan(plans, done, list(finished.values()), len(slots))
    logs = output_dir / "logs"
    require_folder(logs, "logging.output_dir", logs)
    taken = (
        f"{output_dir}: another sweep is writing to it; wait for it to end, or set another "
        f"--output-dir"
    )
    with locked(logs / "lock", taken):
        rows = {plan.id: plan_row(plan) | finished[plan.id] for plan in plans if plan.id in done}
        summary = open_summary(
            output_dir, args.resume, list(rows.values()), {plan.id for plan in plans}
        )
        print_progress(
            f"{len(plans)} runs, {len(done)} of them finished before; their output: {logs}"
        )
        return run_all(args, plans, rows, slots, summary, logs)


def refuse_shared_graphs(plans: Sequence[Planned]) -> None:
    """Raises RequestError for runs of one process that record CUDA graphs of their own: the second
    one ended in an illegal memory access on an H200, for a reason that is not known.
    """
    for plan in plans:
        if plan.config is None or plan.config.ast.mode != "ast":
            continue
        graphs = plan.config.training.compile == "reduce-overhead"
        if graphs and plan.config.ast.reuse_forward is not False:
            raise RequestError(
                f"--one-process: {plan.name}: ast.reuse_forward with "
                "training.compile=reduce-overhead needs a process of its own"
            )


def run_all(
    args: argparse.Namespace,
    plans: Sequence[Planned],
    rows: dict[str, dict[str, Any]],
    slots: Sequence[str | None],
    summary: Path,
    logs: Path,
) -> int:
    """Run the `plans` without a line in `rows`, add their lines to the `summary`, and return the
    exit code.
    """
    ahead = [plan for plan in plans if plan.id not in rows]
    names = {plan.id: plan.name for plan in plans}

    def record(row: dict[str, Any], still: Sequence[Planned]) -> None:
        rows[row["id"]] = row
        append_jsonl(summary, row)
        left = time_left(rows.values(), still, len(slots)) if still else None
        ended = f"[{len(plans) - len(still):>3}/{len(plans):<3}]"
        print_progress(
            f"{ended} {row_line(row, names[row['id']])}{f'  ({left} left)' if left else ''}"
        )

    halt = Halt()
    halt.watch_signals()
    for plan in ahead:
        if plan.error is not None:
            wrong = {
                "status": "failed",
                "exit_code": 2,
                "duration_seconds": 0.0,
                "error": plan.error,
            }
            record(
                plan_row(plan) | wrong,
                [other for other in ahead if other.id not in rows and other != plan],
            )
    sound = hand_over([plan for plan in ahead if plan.error is None], logs)
    if args.one_process:
        work_off_here(sound, run_experiment.main, logs, halt, record)
    else:
        work_off(sound, RUNNER, slots, logs, halt, record)
    own = [rows[plan.id] for plan in plans if plan.id in rows]
    bad = [row for row in own if row["exit_code"]]
    print_progress(
        f"\n{len(own) - len(bad)} of {len(plans)} runs done, {len(plans) - len(own)} not started"
    )
    print_progress(
        "".join(f"{row_line(row, names[row['id']])}\n" for row in bad) + f"summary: {summary}"
    )
    return 128 + halt.signals[0] if halt.signals else int(bool(bad))


if __name__ == "__main__":
    sys.exit(run_cli(main))
