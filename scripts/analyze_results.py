"""Compare finished runs: a table with seeds as replicates, plots and a report; or
follow a run while it goes on.

    python scripts/analyze_results.py --results-dir results
    python scripts/analyze_results.py --results-dir monday tuesday \\
        --plot --save-dir plots --report report.html
    python scripts/analyze_results.py --follow results/run.jsonl

Reads every final_results_*.json of the folders, also those that hold only the
documented keys. Runs that differ in their seed alone are one setting. Runs on
other data or with another model are a group of their own, with its own table,
baseline, verdict and figures. Accuracies are in percent, activation is a share
of 0 to 1, time is seconds of training, energy is in kJ: measured by NVML, or
estimated as time x TDP. Exit codes: 0 done; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.base.errors import RequestError, one_line
from lab.base.files import no_formula, output_path, user_path, write_outputs
from lab.base.launch import forget_launch
from lab.base.plotting import import_matplotlib
from lab.base.streams import print_progress
from lab.study.cli import command_parser, run_cli
from lab.study.following import follow
from lab.study.results import load_runs

if TYPE_CHECKING:
    import pandas as pd

    from lab.study.analysis.study import Study


OPTIONS: dict[str, dict[str, Any]] = {  # of the command line, by name
    "--results-dir": {
        "default": [Path("results")],
        "type": user_path,
        "nargs": "+",
        "metavar": "DIR",
        "help": "folders of final_results_*.json, default: results",
    },
    "--dataset": {"metavar": "NAME", "help": "leave out runs on any other"},
    "--same-data": {
        "default": [],
        "nargs": "+",
        "metavar": "NAME=DIR,DIR",
        "help": "the runs in these folders are on the same pictures, and are compared",
    },
    "--baseline": {
        "metavar": "SETTING",
        "help": "compare with it; default: the most accurate dense one",
    },
    "--csv": {
        "type": output_path,
        "metavar": "FILE",
        "help": "write the table with all digits and columns",
    },
    "--markdown": {
        "type": output_path,
        "metavar": "FILE",
        "help": "write the table as Markdown; -: to standard output, as with --csv and --latex",
    },
    "--latex": {
        "type": output_path,
        "metavar": "FILE",
        "help": "write the table as LaTeX (booktabs)",
    },
    "--plot": {"action": "store_true", "help": "write each figure as PNG and SVG"},
    "--save-dir": {
        "type": user_path,
        "metavar": "DIR",
        "help": "for the figures (default: RESULTS_DIR/plots)",
    },
    "--title": {
        "metavar": "TEXT",
        "help": "of figures and report, instead of the names of data and model",
    },
    "--frontier": {
        "type": user_path,
        "metavar": "FILE",
        "help": "draw final accuracy against training time: .png or .svg",
    },
    "--report": {
        "type": user_path,
        "metavar": "FILE",
        "help": "write one self-contained HTML page",
    },
    "--follow": {
        "type": user_path,
        "metavar": "FILE",
        "help": "show a run's logging.jsonl_path as it grows",
    },
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    return parser.parse_args(argv)


def folders_by_name(texts: Sequence[str], folders: Sequence[Path]) -> dict[Path, str]:
    """By folder, the name of the data that its runs are on. Raises RequestError for a text that is
    not NAME=DIR,DIR, and for a folder that is not among the others or has two names.
    """
    names = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        if not (name.strip() and equals and listed):
            raise RequestError(f"--same-data: {one_line(text, 60)}: expected NAME=DIR,DIR")
        for folder in map(user_path, listed.split(",")):
            if folder not in folders:
                raise RequestError(f"--same-data: {one_line(folder)}: not in --results-dir")
            if names.setdefault(folder, name.strip()) != name.strip():
                raise RequestError(f"--same-data: {one_line(folder)}: two names")
    return names


def print_study(study: Study, show: Callable[..., None]) -> None:
    from lab.study.analysis.tables import frontier_lines, text_table, verdict

    show(text_table(study).to_string(index=False))
    if study.baseline is not None:
        show(f"difference: in points, against {study.baseline}")
    show("\n".join([*frontier_lines(study), verdict(study)]))
    for text in study.warnings:
        show(f"warning: {text}")


def print_studies(studies: Sequence[Study], show: Callable[..., None]) -> None:
    """show: prints a line, as `print` does."""
    from lab.study.analysis.tables import several

    if line := several(studies):
        show(line)
    for study in studies:
        if line:
            show(f"\n== {study.title}")
        print_study(study, show)
    for path, reason in studies[0].left_out.items():
        show(f"left out: {path}: {reason}")


def all_digits(studies: Sequence[Study]) -> str:
    """The tables as one CSV, with all digits and columns, and the group in a column."""
    import pandas as pd

    tables = [study.table.assign(group=study.title, baseline=study.baseline) for study in studies]
    return to_csv(pd.concat([table.astype(object) for table in tables]).rename_axis("setting"))


def to_csv(table: pd.DataFrame) -> str:
    """As CSV; see `no_formula`."""
    return table.map(no_formula).rename(index=no_formula).to_csv()


def requested_outputs(
    args: argparse.Namespace, studies: Sequence[Study]
) -> dict[Path, tuple[str, bytes]]:
    """By path, the option that asks for a file and the file's content."""
    from lab.study.analysis.tables import to_latex, to_markdown

    outputs: dict[Path, tuple[str, bytes]] = {}

    def add(option: str, path: Path, text: str) -> None:
        outputs[path] = option, text.encode("utf-8", "replace")

    if args.csv is not None:
        add("--csv", args.csv, all_digits(studies))
    if args.markdown is not None:
        add("--markdown", args.markdown, to_markdown(studies))
    if args.latex is not None:
        add("--latex", args.latex, to_latex(studies))
    if args.plot or args.report is not None or args.frontier is not None:
        import_matplotlib()
    if args.frontier is not None:
        from lab.study.analysis.figures import (
            draw_frontier,  # matplotlib takes a second that a table need not
        )

        outputs[args.frontier] = "--frontier", draw_frontier(args.frontier, studies)
    if args.plot:
        from lab.study.analysis.figures import draw_groups

        folder = args.save_dir or args.results_dir[0] / "plots"
        outputs |= {
            folder / name: ("--save-dir", content) for name, content in draw_groups(studies).items()
        }
    if args.report is not None:
        from lab.study.analysis.report import render

        add("--report", args.report, render(studies))
    return outputs


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    forget_launch()
    if args.follow is not None:
        follow(args.follow)
    same_data = folders_by_name(args.same_data, args.results_dir)
    runs, left_out = load_runs(args.results_dir, args.dataset, same_data)
    from lab.study.analysis.study import compare  # here: pandas takes a second to import

    studies = compare(runs, left_out, args.baseline)
    if args.title is not None and len(studies) == 1:
        studies[0].title = one_line(args.title, 200)
    files = (args.csv, args.markdown, args.latex, args.report, args.frontier)
    to_files = args.plot or any(path is not None for path in files)
    outputs = requested_outputs(args, studies)
    write_outputs(outputs)  # before a table that the terminal may not take
    print_studies(studies, print_progress if to_files else print)
    for path, (option, _) in outputs.items():
        print_progress(f"{option.removeprefix('--').replace('save-dir', 'plot')}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
