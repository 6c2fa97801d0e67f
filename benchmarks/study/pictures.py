"""Draw the study's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from step_trl.evaluation import composition
from step_trl.report import (
    pareto_front,
    plot_accuracy_against_tokens,
    plot_composition,
    plot_semantic_density,
    plot_training,
)
from step_trl.report.figures import COLORS, MARKERS, STYLE

from .arms import METHODS, Arm
from .budgets import BUDGETS, compared, points_at
from .records import CURVES
from .results import Results
from .run import VANILLA


MAIN = ("grpo", "grpo-short", "step-grpo", "sas")  # the arms whose steps and training are shown


def draw(results: Results, tables: Mapping[str, pd.DataFrame], arms: Sequence[Arm], page: Path) -> list[str]:
    """
    Draw all pictures of finished arms for which the trainings are finished, and return their names, without `.png`.

    `tables` are the results of [`Results.table`] by arm.
    """
    figures = {}
    with matplotlib.rc_context(STYLE):
        main = [arm.name for arm in arms if arm.name in MAIN]
        if any(set(METHODS) & set(arm.tables) for arm in arms):
            figures["accuracy"] = _accuracy(tables, arms)
        if len(compared(results)) > 1:
            figures["budgets"] = _budgets(results)
        if known := [name for name in main if results.trainings(name, "redundancy")]:
            figures["steps"] = _steps(results, [VANILLA, *known])
        if known := [name for name in main if results.history(name)]:
            figures["training"] = _training(results, known)
        if long := [arm.name for arm in arms if arm.checkpoints]:
            figures["long"] = _long(results, long)
        for name, figure in figures.items():
            figure.savefig(page / f"{name}.png")
    return list(figures)


def _accuracy(tables: Mapping[str, pd.DataFrame], arms: Sequence[Arm]) -> Figure:
    """Draw both papers' first tables, side by side."""
    papers = [title for title in METHODS if any(title in arm.tables for arm in arms)]
    figure = Figure(figsize=(7 * len(papers), 4.5), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(papers), squeeze=False).flat, papers, strict=True):
        names = [VANILLA, *(arm.name for arm in arms if title in arm.tables)]
        plot_accuracy_against_tokens(axes, {name: tables[name] for name in names})
        axes.set_title(title)
    return figure


def _budgets(results: Results) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(BUDGETS)), BUDGETS, strict=True):
        points = points_at(results, budget)
        front = zip(*(points[name] for name in pareto_front(points)), strict=True)
        axes.plot(*front, "--", color="#999999", linewidth=1, label="Pareto front")
        for (color, marker), (name, (tokens, accuracy)) in zip(
            zip(cycle(COLORS), cycle(MARKERS), strict=False), points.items(), strict=False
        ):
            axes.scatter(tokens, accuracy, s=36, color=color, marker=marker, label=results.marked(name))
        axes.set(title=f"at most {budget} tokens", xlabel="mean tokens per completion")
    figure.axes[0].set_ylabel("accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    return figure


def _steps(results: Results, models: Sequence[str]) -> Figure:
    labels = pd.concat([results.labels(name).assign(model=name) for name in models])
    shares = composition(labels).xs("overall", level="benchmark")
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_composition(left, shares)
    plot_semantic_density(right, {name: results.samples[name] for name in models})
    return figure


def _training(results: Results, arms: Sequence[str]) -> Figure:
    histories = {name: results.history(name) for name in arms}
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        plot_training(axes, histories, key, label)
    figure.axes[0].legend()
    return figure


def _long(results: Results, arms: Sequence[str]) -> Figure:
    histories = {name: results.history(name) for name in arms}
    figure = Figure(figsize=(10, 8), layout="constrained")
    accuracy, tokens, *others = figure.subplots(3, 2).flat
    for color, name in zip(COLORS[1:], arms, strict=False):
        progress = results.progress(name)
        accuracy.plot(progress["accuracy"], "o-", color=color, label=name)
        tokens.plot(progress["tokens"], "o-", color=color)
    accuracy.set(xlabel="update", ylabel="accuracy, held-out problems")
    tokens.set(xlabel="update", ylabel="tokens, held-out problems", ylim=(0, None))
    accuracy.legend()
    for axes, (key, label) in zip(others, CURVES.items(), strict=True):
        plot_training(axes, histories, key, label)
    return figure
