"""All methods at several budgets: a model may be short only because long completions are cut off."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from step_trl.report import pareto_front
from step_trl.report.tables import to_markdown

from .arms import COMPARED
from .results import Results
from .run import VANILLA


BUDGETS = (128, 256, 512)  # tokens; the last one is that of the evaluation


def compared(results: Results) -> list[str]:
    """Return the finished arms that are compared, after the vanilla model."""
    return [VANILLA, *(name for name in COMPARED if name in results.samples)]


def points_at(results: Results, budget: int) -> dict[str, tuple[float, float]]:
    """Return tokens and accuracy of all compared arms at a budget."""
    overall = {name: results.at_budget(name, budget) for name in compared(results)}
    return {name: (means["tokens"], means["accuracy"]) for name, means in overall.items()}


def budget_lines(results: Results, budgets: Sequence[int] = BUDGETS) -> list[str]:
    """Return a Markdown table of all compared arms at each budget, and a line about each Pareto front."""
    points = {budget: points_at(results, budget) for budget in budgets}
    fronts = {budget: pareto_front(points[budget]) for budget in budgets}
    rows = {}
    for name in compared(results):
        row = rows[results.marked(name)] = {"seeds": str(len(results.seeds[name]))}
        for budget in budgets:
            tokens, accuracy = points[budget][name]
            row[f"accuracy at {budget}, %"] = f"{100 * accuracy:.1f}"
            row[f"tokens at {budget}"] = f"{tokens:.0f}"
        row["on the front at"] = ", ".join(str(budget) for budget in budgets if name in fronts[budget])
    fronts_told = []
    for budget in budgets:
        named = (
            f"`{name}` ({100 * points[budget][name][1]:.1f} %, {points[budget][name][0]:.0f})"
            for name in fronts[budget]
        )
        fronts_told.append(f"- {budget} tokens: {', '.join(named)}.")
    return [
        "Completions are cut off at each budget, and what is cut off counts as wrong. Sampling goes from left to "
        "right, so that this is what the models would have answered within the budget. Accuracy and tokens are means "
        "over the four sets.",
        "",
        to_markdown(pd.DataFrame.from_dict(rows, orient="index")),
        "",
        "The Pareto front of each budget, from the shortest to the most accurate (differences of a few points are "
        "within the noise that the claims above state):",
        "",
        *fronts_told,
    ]
