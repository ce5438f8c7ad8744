"""A study as text: the table of settings and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lab.base.errors import one_line
from lab.study.analysis.study import OF_BEST, Study
from lab.study.results import ACTIVATION_BAND


def points(difference: float, half: float) -> str:
    """A difference in points with half its 95 % interval, as far as they are known."""
    text = "-" if pd.isna(difference) else f"{difference:+.2f}"
    return text if pd.isna(half) else f"{text} ± {half:.2f}"


def match_text(row: Any, prefix: str = "") -> str:
    """A row's time to match, with its interval; see `statistics.time_to_match`. `prefix`: "" or
    OF_BEST.
    """
    ratio, bound, low, high, low_cut, high_cut = (
        getattr(row, f"{prefix}time_to_match{part}")
        for part in ("", "_bound", "_low", "_high", "_low_cut", "_high_cut")
    )
    if row.void:
        return f"void: {row.void}"
    if bound == "not resolved" or pd.isna(ratio):
        return bound or "-"
    text = f"{bound} {ratio:.2f}".strip()
    ends = f"{'< ' * low_cut}{low:.2f}", f"{'> ' * high_cut}{high:.2f}"
    return text if bound or set(ends) == {text} else f"{text} ({ends[0]} to {ends[1]})"


def text_table(study: Study) -> pd.DataFrame:
    """The table of settings, text throughout: the terminal, Markdown, LaTeX and the page show these
    same figures.
    """
    table = study.table

    def show(column: str, spec: str) -> list[str]:
        return ["-" if pd.isna(value) else format(value, spec) for value in table[column]]

    def gaps(column: str) -> list[str]:
        return [points(*pair) for pair in zip(table[column], table[f"{column}_ci95"], strict=True)]

    equal = [
        "void" if void else text
        for void, text in zip(table["void"], gaps("equal_time"), strict=True)
    ]

    columns = {
        "setting": list(table.index),
        "n": show("n", "d"),
        "final %": show("final_mean", ".2f"),
        "sd": show("final_sd", ".2f"),
        "± 95 %": show("final_ci95", ".2f"),
        "best %": show("best_mean", ".2f"),
        "difference": gaps("difference"),
        "at equal time": equal,
        "time to match": [match_text(row) for row in table.itertuples()],
        "to best dense": gaps("best_dense"),
        "train s": show("train_seconds_mean", ".1f"),
        "s sd": show("train_seconds_sd", ".1f"),
        "kJ": show("energy_kj_mean", ".4g"),
        "kJ (estimate)": show("est_energy_kj_mean", ".4g"),
        "TFLOP": show("tflop", ".4g"),
        "epochs": show("epochs", ".4g"),
        "activation": show("activation", ".3f"),
        "off target": show("activation_error", ".3f"),
    }
    if columns["to best dense"] == columns["difference"]:
        del columns["to best dense"]  # the baseline is the best dense setting
    always = ("setting", "n", "final %")
    return pd.DataFrame(
        {name: texts for name, texts in columns.items() if name in always or set(texts) != {"-"}}
    )


Sentence = tuple[str, str]  # its subject, and the rest


def gap_sentence(name: str, other: str, difference: float, half: float) -> Sentence:
    """That one beats or loses to the other, or that their difference is within its interval."""
    size = points(abs(difference), half).removeprefix("+")
    if pd.isna(half):
        where = "above" if difference > 0 else "below"
        return name, f"is {size} points {where} {other}; an interval needs two seeds of each."
    if abs(difference) <= half:
        return (
            name,
            f"shows no significant difference to {other}: {points(difference, half)} points.",
        )
    return name, f"{'beats' if difference > 0 else 'loses to'} {other} by {size} points."


def match_sentence(study: Study, name: str) -> Sentence:
    """A setting's time to match, in words; its interval allows for picking the best setting."""
    row = next(study.table.loc[[name]].itertuples())
    text = match_text(row, OF_BEST)
    bound = getattr(row, f"{OF_BEST}time_to_match_bound")
    if row.void:
        return (
            name,
            f"is not compared by time: dense steps of the compared runs took {row.void}, so the "
            f"machine was not the same.",
        )
    if bound == "not resolved":
        return (
            f"Whether {name}",
            "saves training time is not resolved: it needs more seeds or dense lengths.",
        )
    if bound == "<":
        return name, f"beats dense training of every length: its time to match is {text}."
    if bound == ">":
        return (
            name,
            f"is less accurate than the shortest dense setting: its time to match is {text}.",
        )
    return name, f"takes {text} of the time of dense training that is as accurate."


def against_dense(study: Study, sparse: Sequence[str]) -> list[Sentence]:
    """What the most accurate sparse setting is worth against dense training, and the one of least
    time to match.
    """
    table = study.table
    name = sparse[0]
    found = []
    equal = table.loc[name, ["equal_time", f"{OF_BEST}equal_time_ci95"]]
    if pd.notna(equal.iloc[0]):
        found.append(gap_sentence(name, "dense training of the same time", *equal))
    rows = table.loc[list(sparse)]
    bounds = rows[f"{OF_BEST}time_to_match_bound"]
    if rows.loc[name, "void"] or bounds[name] or pd.notna(rows.loc[name, "time_to_match"]):
        found.append(match_sentence(study, name))
    known = rows[bounds.isin(["", "<"]) & rows[f"{OF_BEST}time_to_match"].notna()]
    if len(known) and (least := known["time_to_match"].idxmin()) != name:
        found.append(match_sentence(study, least))
    if study.rivals > 1 and table.loc[name, "n"] > 1 and table["dense"].any():
        rest = f"allow for the choice of the best of {study.rivals} settings (Bonferroni)."
        found.append(("The intervals against dense training", rest))
    return found


def in_words(sentences: Sequence[Sentence]) -> list[str]:
    """The sentences as texts; a subject that comes again is "it"."""
    words = []
    before = None
    for subject, rest in sentences:
        again = before is not None and subject.removeprefix("Whether ") == before
        said = ("Whether it" if subject.startswith("Whether ") else "It") if again else subject
        words.append(f"{said} {rest}")
        before = subject.removeprefix("Whether ")
    return words


def verdict(study: Study) -> str:
    """The sentences of the verdict as one text."""
    return " ".join(verdict_sentences(study))


def verdict_sentences(study: Study) -> list[str]:
    """Which setting wins, by how much, what it is worth against dense training, and the
    controller's error.
    """
    table = study.table
    ranked = table.index[table["final_mean"].notna()]
    if not study.comparable:
        return [
            "The files do not say which data and model they are of: they are listed, not compared."
        ]
    if not len(ranked):
        return ["No run has an accuracy."]
    figures = text_table(study).set_index("setting").to_dict("index")
    best = ranked[0]
    base = study.baseline
    spread = figures[best].get("± 95 %", "-")
    count = int(table.loc[best, "n"])
    half = f" ± {spread}" if spread != "-" else ""
    accuracy = f"{figures[best]['final %']}{half} % ({count} seed{'s' * (count > 1)})"
    told = "the highest final accuracy:" if len(ranked) > 1 else "a final accuracy of"
    sentences: list[Sentence] = [(best, f"has {told} {accuracy}.")]
    sparse = [name for name in ranked if not table.loc[name, "dense"]]
    other = (
        best if base != best else next((name for name in [*sparse, *ranked] if name != base), None)
    )
    if base in ranked and other is not None:
        prefix = OF_BEST * (other in sparse)
        difference = table.loc[other, ["difference", f"{prefix}difference_ci95"]]
        sentences.append(gap_sentence(other, base, *difference))
    sentences += against_dense(study, sparse) if sparse else []
    if not study.frontiers:
        sentences.append(
            ("No finished dense run", "with its time was found: time to match is not known.")
        )
    errors = table["activation_error"].dropna()
    if len(errors):
        worst = errors.idxmax()
        where = f" ({worst})." if errors.max() > ACTIVATION_BAND else "."
        off = (
            f"was at most {figures[worst]['off target']} off its target after the first "
            f"sparse epoch{where}"
        )
        sentences.append(("Activation", off))
    return in_words(sentences)


def frontier_lines(study: Study) -> list[str]:
    """The dense frontiers in words, one line each; where there are several, with their machines."""
    lines = []
    for machine, frontier in study.frontiers.items():
        where = f" ({machine})" if len(study.frontiers) > 1 else ""
        ends = ", ".join(
            f"{each.means[1]:.2f} % in {each.means[0]:.1f} s" for each in frontier.points
        )
        lines.append(one_line(f"dense frontier{where}: {ends}"))
    return lines


def several(studies: Sequence[Study]) -> str | None:
    """A line on the comparison groups, where there are several."""
    count = len(studies)
    return f"{count} comparison groups: nothing is compared across them." if count > 1 else None


def to_markdown(studies: Sequence[Study]) -> str:
    """The tables as Markdown, each under its group's title where there are several."""
    parts = []
    for study in studies:
        table = text_table(study)
        rows = [
            list(table.columns),
            ["---", *["--:"] * (len(table.columns) - 1)],
            *table.to_numpy().tolist(),
        ]
        lines = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows
        )
        parts.append((f"## {study.title}\n\n" if len(studies) > 1 else "") + "".join(lines))
    return "\n".join(parts)


def to_latex(studies: Sequence[Study]) -> str:
    """The tables for LaTeX (booktabs); where there are several groups, each title is a row over its
    table.
    """
    parts = []
    for study in studies:
        table = text_table(study)
        style = (
            table.style.hide(axis="index")
            .format(escape="latex")
            .format_index(escape="latex", axis="columns")
        )
        latex = style.to_latex(hrules=True, column_format="l" + "r" * (len(table.columns) - 1))
        if len(studies) > 1:
            title = pd.DataFrame({"": [study.title]}).style.hide(axis="index").hide(axis="columns")
            cell = (
                title.format(escape="latex").to_latex().splitlines()[1].removesuffix("\\\\").strip()
            )
            row = f"\\multicolumn{{{len(table.columns)}}}{{l}}{{{cell}}} \\\\\n"
            latex = latex.replace("\\toprule\n", f"\\toprule\n{row}", 1)
        parts.append(latex)
    return "\n".join(parts)
