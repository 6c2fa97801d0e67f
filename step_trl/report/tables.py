"""Create the papers' results table from summaries."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


def results_frame(tables: Mapping[str, pd.DataFrame], intervals: bool = False) -> pd.DataFrame:
    """
    Create a table with one row per model: accuracy in percent and tokens per benchmark and overall, then CR and AES.

    Args:
        tables (`Mapping[str, DataFrame]`), intervals (`bool`, *optional*, defaults to `False`):
            The results of [`~step_trl.evaluation.summarize`] by model, and whether to add half the width of its
            interval to each number.

    Returns:
        [`~pandas.DataFrame`]: The table as text, with columns `(benchmark, measure)`.
    """
    rows = {}
    for model, table in tables.items():
        row = {}
        for benchmark in table.index:
            for measure, label, scale, digits in (("accuracy", "Acc", 100, 1), ("tokens", "Tok", 1, 0)):
                row[str(benchmark), label] = _number(table, benchmark, measure, scale, digits, intervals)
        for measure, label in (("cr", "CR"), ("aes", "AES")):
            if measure in table:
                row["overall", label] = _number(table, "overall", measure, 1, 2, intervals)
        rows[model] = row
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame


def _number(table: pd.DataFrame, benchmark, measure: str, scale: float, digits: int, intervals: bool) -> str:
    value = table.loc[benchmark, measure] * scale
    if pd.isna(value):
        return "–"
    text = f"{value:,.{digits}f}"
    if intervals:
        width = (table.loc[benchmark, f"{measure}_high"] - table.loc[benchmark, f"{measure}_low"]) * scale
        text += f" ± {width / 2:,.{digits}f}"
    return text


def to_markdown(frame: pd.DataFrame) -> str:
    """Format a frame of texts in GitHub's Markdown. Rows are named on the left, cells are aligned to the right."""
    escaped = frame.rename(index=_escape, columns=_escape)
    alignment = ("left", *["right"] * frame.shape[1]) if len(frame) else None  # tabulate cannot align an empty table
    return escaped.to_markdown(disable_numparse=True, colalign=alignment)


def _escape(name: object) -> str:
    return str(name).replace("|", "\\|")


def markdown_table(tables: Mapping[str, pd.DataFrame], intervals: bool = False) -> str:
    """Return the table of [`results_frame`] in GitHub's Markdown."""
    frame = results_frame(tables, intervals)
    return to_markdown(frame.set_axis([" ".join(column) for column in frame.columns], axis="columns"))


def budgets_table(table: pd.DataFrame) -> str:
    """
    Return a table in GitHub's Markdown that compares lengths with the token budgets that prompts ask for.

    `table` is the result of [`~step_trl.evaluation.summarize`], with `deviation` and `over_target`.
    """
    columns = {
        "Acc": ("accuracy", 100, 1, ""),
        "Tok": ("tokens", 1, 0, ""),
        "distance from target": ("deviation", 100, 1, " %"),
        "above target": ("over_target", 100, 1, " %"),
    }
    rows = {
        benchmark: {
            label: _number(table, benchmark, measure, scale, digits, False) + unit
            for label, (measure, scale, digits, unit) in columns.items()
        }
        for benchmark in table.index
    }
    return to_markdown(pd.DataFrame.from_dict(rows, orient="index"))


def latex_table(tables: Mapping[str, pd.DataFrame], intervals: bool = False) -> str:
    """Return the table of [`results_frame`] in LaTeX, for the `booktabs` package."""
    frame = results_frame(tables, intervals)
    return frame.to_latex(escape=True, multicolumn_format="c", column_format="l" + "r" * frame.shape[1])
