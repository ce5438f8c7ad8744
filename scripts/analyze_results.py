"""Compare finished runs: a table with seeds as replicates, plots and a report; or
follow a run while it goes on.

    python scripts/analyze_results.py --results-dir results
    python scripts/analyze_results.py --results-dir results --plot \\
        --save-dir results/plots
    python scripts/analyze_results.py --results-dir monday tuesday \\
        --baseline dense --report results/report.html
    python scripts/analyze_results.py --results-dir results \\
        --frontier results/frontier.png
    python scripts/analyze_results.py --follow results/run.jsonl

Reads every final_results_*.json of the folders, also those that hold only the
documented keys. Runs that differ in nothing but their seed are one setting.
Only runs on the same data with the same model are compared: where there are
others, each such group has its own table, baseline, verdict and figures.
Accuracies are in percent, activation a share of 0 to 1, time in seconds of
training, energy in kJ: measured by NVML, or estimated as time x TDP. Exit
codes: 0 done; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.base.errors import one_line
from lab.base.files import no_formula, output_path, user_path, write_outputs
from lab.base.launch import forget_launch
from lab.base.plotting import import_matplotlib
from lab.base.streams import print_progress
from lab.study.cli import command_parser, run_cli

if TYPE_CHECKING:
    import pandas as pd

    from lab.study.analysis.study import Study


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--results-dir",
        default=[Path("results")],
        type=user_path,
        nargs="+",
        metavar="DIR",
        help="folders of final_results_*.json, default: results",
    )
    parser.add_argument("--dataset", metavar="NAME", help="leave out runs on any other")
    parser.add_argument(
        "--baseline",
        metavar="SETTING",
        help="compare with it; default: the most accurate dense one",
    )
    parser.add_argument(
        "--csv",
        type=output_path,
        metavar="FILE",
        help="write the table with all digits and columns",
    )
    parser.add_argument(
        "--markdown",
        type=output_path,
        metavar="FILE",
        help="write the table as Markdown; -: to standard output, as with --csv and --latex",
    )
    parser.add_argument(
        "--latex", type=output_path, metavar="FILE", help="write the table as LaTeX (booktabs)"
    )
    parser.add_argument("--plot", action="store_true", help="write each figure as PNG and SVG")
    parser.add_argument(
        "--save-dir",
        type=user_path,
        metavar="DIR",
        help="for the figures (default: RESULTS_DIR/plots)",
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        help="of figures and report, instead of the names of data and model",
    )
    parser.add_argument(
        "--frontier",
        type=user_path,
        metavar="FILE",
        help="draw final accuracy against training time; FILE ends in .png or .svg",
    )
    parser.add_argument(
        "--report", type=user_path, metavar="FILE", help="write one self-contained HTML page"
    )
    parser.add_argument(
        "--follow",
        type=user_path,
        metavar="FILE",
        help="show a run's logging.jsonl_path as it grows",
    )
    return parser.parse_args(argv)


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
    # here, because pandas takes a second, which neither help nor a wrong option needs
    from lab.study.analysis.study import compare
    from lab.study.analysis.tables import follow
    from lab.study.results import load_runs

    if args.follow is not None:
        follow(args.follow)
    studies = compare(*load_runs(args.results_dir, args.dataset), args.baseline)
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
