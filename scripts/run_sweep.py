"""Run many configs, each run in a process of its own, and list how each ended.

    python scripts/run_sweep.py --configs configs/digits_smoke.yaml --jobs 2 \\
        --grid ast.mode=ast,random ast.target_activation=0.1,0.25,0.5
    python scripts/run_sweep.py --configs configs/cifar10_resnet18_ast.yaml \\
        --launcher slurm --partition gpu --gpus 1 --cpus 8 --timeout-min 120 \\
        --jobs 16 --random 40 "training.lr=log(1e-3,1)" --resume

A run that fails is listed, and the others go on. The same command again, here
or on another machine with this disk, takes the next free runs. Where one
command dies, the others do its runs. Each run that ends adds a line to
<output_dir>/sweep_summary_<timestamp>.jsonl. What it printed is in
<output_dir>/logs/. Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 reach the runs, which
save and end. A second Ctrl-C kills them.
Exit codes: 0 all done; 1 a run failed; 2 wrong request; 130 to 143 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import run_experiment
from lab.base.errors import RequestError
from lab.base.files import require_folder, user_text
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.config.grid import as_overrides, cross, random_points, take_overrides
from lab.study.cli import add_import, command_parser, run_cli
from lab.study.sweep.halving import Halving
from lab.study.sweep.halving import library as optuna_or_refuse
from lab.study.sweep.jobs import JobOptions, launch_jobs
from lab.study.sweep.plans import Planned, hand_over, plan_runs
from lab.study.sweep.processes import Halt, slots_of, work_off, work_off_here
from lab.study.sweep.sharing import Board, Round, joined
from lab.study.sweep.summary import (
    as_written,
    finished_runs,
    is_done,
    open_summary,
    plan_row,
    results_table,
    row_line,
    show_plan,
    time_left,
)

RUNNER = Path(__file__).with_name("run_experiment.py")


OPTIONS: dict[str, dict[str, Any]] = {  # of the command line, by name
    "--configs": {"required": True, "nargs": "+", "metavar": "FILE", "help": "run in this order"},
    "--grid": {"nargs": "+", "metavar": "KEY=V,V", "help": "every combination of these"},
    "--random": {
        "nargs": "+",
        "metavar": "N KEY=F",
        "help": "N points: log(A,B), uniform(A,B), choice(A,B,..)",
    },
    "--random-seed": {"type": int, "metavar": "S", "help": "of these points (default 0)"},
    "--variants": {
        "nargs": "+",
        "metavar": '"KEY=V .."',
        "help": "a run with each set of overrides",
    },
    "--seeds": {"nargs": "+", "metavar": "N", "help": "every run with each of these seeds"},
    "--jobs": {"type": int, "metavar": "N", "help": "runs at a time (default 1)"},
    "--gpus": {
        "nargs": "+",
        "metavar": "G",
        "help": "GPUs a run; CUDA_VISIBLE_DEVICES says which",
    },
    "--launcher": {"choices": ("slurm", "local"), "help": "a job for each run, by submitit"},
    "--partition": {"metavar": "P", "help": "of SLURM"},
    "--cpus": {"type": int, "metavar": "C", "help": "cores of each job"},
    "--timeout-min": {"type": int, "metavar": "M", "help": "minutes of a job, then it is requeued"},
    "--halving": {
        "type": int,
        "metavar": "E",
        "help": "end the worse two thirds at epoch E, 3 E, ..",
    },
    "--one-process": {"action": "store_true", "help": "all in this process, one after the other"},
    "--dense-twin": {"action": "store_true", "help": "a dense run of the same time after each"},
    "--resume": {"action": "store_true", "help": "skip finished runs, go on with others"},
    "--dry-run": {"action": "store_true", "help": "print the plan and its time, and stop"},
    "--output-dir": {"metavar": "DIR", "help": "short for logging.output_dir=DIR"},
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.usage = "run_sweep.py --configs FILE .. [options] [key=value ..]"
    for name, settings in OPTIONS.items():
        names = [name, "--parallel"] if name == "--jobs" else [name]
        parser.add_argument(*names, **settings)
    add_import(parser)
    parser.set_defaults(grid=[], variants=[], seeds=[], random=[], gpus=[], jobs=1, random_seed=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over every config")
    args = parser.parse_intermixed_args(argv)
    take_overrides(args, "configs", "seeds", "gpus")
    args.configs = [user_text(path) for path in args.configs]
    if args.output_dir is not None:
        args.overrides += as_overrides({"logging.output_dir": args.output_dir}, args.overrides)
    args.gpus = gpus_of(args.gpus)
    if args.one_process and (args.gpus or args.jobs != 1 or args.launcher):
        raise RequestError(
            "--one-process: one run at a time, here; leave out --jobs, --gpus and --launcher"
        )
    if args.jobs < 1:
        raise RequestError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.halving is not None:
        if args.halving < 1 or args.one_process or args.launcher:
            raise RequestError("--halving: at least 1, and for runs in processes of this machine")
        optuna_or_refuse()
    if args.partition is not None and args.launcher != "slurm":
        raise RequestError("--partition: only with --launcher slurm")
    for name, value in (("--cpus", args.cpus), ("--timeout-min", args.timeout_min)):
        if value is not None and args.launcher is None:
            raise RequestError(f"{name}: only with --launcher")
        if value is not None and value < 1:
            raise RequestError(f"{name}: expected at least 1, got {value}")
    return args


def gpus_of(values: Sequence[str]) -> int | None:
    """How many GPUs each run is to get. Raises RequestError where it is no such number."""
    if not values:
        return None
    if len(values) > 1 or not values[0].isdecimal() or int(values[0]) < 1:
        raise RequestError(
            f"--gpus {' '.join(values)}: expected how many GPUs each run gets, at least 1; which "
            f"ones are used: CUDA_VISIBLE_DEVICES=0,1; how many runs at a time: --jobs"
        )
    return int(values[0])


def points_of(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """The overrides of each point of the sweep. Raises RequestError for a wrong one."""
    drawn = []
    if args.random:
        count, *draws = args.random
        if not count.isdecimal() or int(count) < 1 or not draws:
            raise RequestError("--random: expected N key=log(A,B) .., with N at least 1")
        drawn = random_points(draws, int(count), args.random_seed)
    return cross(args.grid, args.variants, args.seeds, args.overrides, drawn)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    forget_launch()
    points = points_of(args)
    check = run_experiment.check_config
    plans = plan_runs(
        args.configs, args.overrides, points, args.dense_twin, args.resume, check, args.imports
    )
    plans = [replace(plan, processes=args.gpus or 1) for plan in plans]
    if args.one_process and len(plans) > 1:
        refuse_shared_graphs(plans)
    options = None
    slots: list[str | None] = [None] * args.jobs
    if args.launcher:
        options = JobOptions(args.partition, args.gpus, args.cpus, args.timeout_min)
        options.check(args.launcher)
    if args.launcher != "slurm":
        slots = slots_of(args.jobs, args.gpus)
    output_dir = Path(next(plan.config for plan in plans if plan.config).logging.output_dir)
    finished = as_written(output_dir, finished_runs(plans))
    done = {
        plan.id: plan_row(plan) | finished[plan.id]
        for plan in plans
        if is_done(plan, finished.get(plan.id))
    }
    if args.dry_run:
        kept = [*done] if args.resume else []
        return show_plan(plans, kept, list(finished.values()), len(slots))
    logs = output_dir / "logs"
    require_folder(logs, "logging.output_dir", logs)

    def begin(started: str) -> Round:
        rows = list(done.values()) if args.resume else []
        summary = open_summary(output_dir, args.resume, rows, {plan.id for plan in plans})
        return Round(str(summary), started, args.resume)

    with joined(logs, begin) as (current, is_joined):
        if is_joined:
            print_progress(f"{output_dir}: another command is at work there, this one helps it")
        plans = hand_over(plans, logs)
        board = Board(logs, current, plans)
        board.keep(done if current.resume else {})
        print_progress(
            f"{len(plans)} runs, {len(board.rows)} of them finished before; their output: {logs}"
        )
        return run_all(args, board, slots, options)


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
    board: Board,
    slots: Sequence[str | None],
    options: JobOptions | None,
) -> int:
    """Do the runs of the `board` that are free, and return the exit code."""
    names = {key: plan.name for key, plan in board.plans.items()}

    seen = set(board.rows)

    def record(row: Mapping[str, Any]) -> None:
        seen.add(row["id"])
        ahead = [plan for key, plan in board.plans.items() if key not in seen]
        left = time_left(board.rows.values(), ahead, len(slots)) if ahead else None
        ended = f"[{len(names) - len(ahead):>3}/{len(names):<3}]"
        elsewhere = "" if row["id"] in board.tried or options else "  (by another command)"
        line = f"{ended} {row_line(row, names[row['id']])}{elsewhere}"
        print_progress(f"{line}{f'  ({left} left)' if left else ''}")

    halt = Halt()
    halt.watch_signals()
    if args.one_process:
        work_off_here(board, run_experiment.main, halt, record)
    elif options is not None:
        launch_jobs(args.launcher, board, RUNNER, slots, options, halt, record)
    else:
        halving = Halving(board, args.halving) if args.halving else None
        work_off(board, RUNNER, slots, halt, record, halving=halving)
    own = [board.rows[key] for key in names if key in board.rows]
    bad = [row for row in own if row["exit_code"]]
    print_progress(f"\n{results_table(own, names)}") if own else None
    print_progress(
        f"\n{len(own) - len(bad)} of {len(names)} runs done, {len(names) - len(own)} not started"
    )
    print_progress(
        "".join(f"{row_line(row, names[row['id']])}\n" for row in bad)
        + f"summary: {board.round.summary}"
    )
    return 128 + halt.signals[0] if halt.signals else int(bool(bad))


if __name__ == "__main__":
    sys.exit(run_cli(main))
