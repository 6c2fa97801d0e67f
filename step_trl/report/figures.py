"""Figures of results, all in the same style."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from .history import History


STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
MARKERS = "sD^vP*X<>phd8H"
COLORS = (
    "#4d4d4d",
    "#1b6ca8",
    "#c8553d",
    "#3a7d44",
    "#8e6c8a",
    "#b8860b",
    "#2aa5a0",
    "#d67fb4",
    "#7c4a21",
    "#9bb03c",
    "#111111",
    "#6a6ad4",
)
# These differ from the models' colours.
LABEL_COLORS = {"forward": "#7fb7be", "verification": "#f0c97d", "redundancy": "#c97b84", "unknown": "#dddddd"}


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """
    Return the models on the Pareto front: no other model is as good in both accuracy and tokens, and better in one.

    `points` are the tokens and the accuracy by model. The names are returned from the fewest tokens to the most.
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] or points[name] == points[front[-1]]:
            front.append(name)
    return front


def plot_accuracy_against_tokens(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    """
    Plot accuracy against mean tokens, with one colour per model: a large point overall, a small marker per benchmark.

    A dashed line joins the models on the [`pareto_front`] of the overall values.

    Args:
        axes ([`~matplotlib.axes.Axes`]), tables (`Mapping[str, DataFrame]`):
            The axes to draw on, and the results of [`~step_trl.evaluation.summarize`] by model.
    """
    for color, (name, table) in zip(cycle(COLORS), tables.items(), strict=False):
        benchmarks, overall = table.drop("overall"), table.loc["overall"]
        for marker, (_, row) in zip(cycle(MARKERS), benchmarks.iterrows(), strict=False):
            axes.scatter(row["tokens"], row["accuracy"], s=18, marker=marker, color=color, alpha=0.6)
        axes.scatter(overall["tokens"], overall["accuracy"], s=90, color=color, label=name, zorder=3)
    overalls = {
        name: (table.at["overall", "tokens"], table.at["overall", "accuracy"]) for name, table in tables.items()
    }
    front = pareto_front(overalls)
    if len(front) > 1:
        line = [overalls[name] for name in front]
        axes.plot(*zip(*line, strict=True), "--", color="#999999", linewidth=1, zorder=2, label="Pareto front")
    names = next(iter(tables.values())).index.drop("overall")
    for marker, benchmark in zip(cycle(MARKERS), names, strict=False):
        axes.scatter([], [], s=18, marker=marker, color="#999999", label=str(benchmark))
    axes.set(xlabel="mean tokens per completion", ylabel="accuracy")
    axes.set_xlim(left=0)
    # The legend is outside the axes, because points may be anywhere inside.
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)


def plot_training(axes: Axes, histories: Mapping[str, History], key: str, label: str) -> None:
    """
    Plot a logged metric over training steps, such as `"entropy"`, or `"kl"` (logged if `beta` is above 0).

    Args:
        axes ([`~matplotlib.axes.Axes`]), histories (`Mapping[str, Sequence[Mapping[str, float]]]`):
            The axes to draw on, and `trainer.state.log_history` by model.
        key (`str`), label (`str`):
            The name of the logged metric, and the label of the axis.
    """
    # The first colour is for the vanilla model, which is not trained.
    for color, (name, history) in zip(cycle(COLORS[1:]), histories.items(), strict=False):
        _plot_history(axes, history, key, color, name)
    axes.set(xlabel="update", ylabel=label)


def plot_training_dynamics(
    axes: Axes,
    history: History,
    accuracy: str = "rewards/math_accuracy_reward/mean",
    length: str = "completions/mean_length",
) -> Axes:
    """
    Plot accuracy (left axis) and length (right axis) of the rollouts of one training.

    Args:
        axes ([`~matplotlib.axes.Axes`]), history (`Sequence[Mapping[str, float]]`):
            The axes to draw on, and `trainer.state.log_history` or the result of [`read_history`].
        accuracy (`str`), length (`str`):
            The names of the logged metrics.

    Returns:
        [`~matplotlib.axes.Axes`]: The right axis.
    """
    for key in (accuracy, length):
        if not any(entry.get(key) is not None for entry in history):
            logged = sorted({name for entry in history for name in entry})
            raise ValueError(f"history: {key!r} was not logged. Set `accuracy` and `length` to two of {logged}.")
    other = axes.twinx()
    sides = ((axes, accuracy, COLORS[1], "accuracy"), (other, length, COLORS[2], "tokens per rollout"))
    for side, key, color, label in sides:
        _plot_history(side, history, key, color)
        side.set_ylabel(label, color=color)
        side.tick_params(axis="y", colors=color)
    axes.set_xlabel("update")
    # The lines of one grid would cross those of the other.
    other.grid(False)
    other.spines["right"].set_visible(True)
    other.set_ylim(bottom=0)
    return other


def _plot_history(axes: Axes, history: History, key: str, color: str, label: str | None = None) -> None:
    points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    smooth = pd.Series(values, dtype=float).rolling(5, min_periods=1, center=True).mean()
    axes.plot(steps, smooth, color=color, label=label)


def plot_composition(axes: Axes, shares: pd.DataFrame) -> None:
    """
    Plot the composition of steps: one bar per model (below the name of each benchmark), stacked by label.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            The axes to draw on. About 0.25 inches of height per row of `shares`, and per benchmark, are enough.
        shares ([`~pandas.DataFrame`]):
            The result of [`~step_trl.evaluation.composition`], or some of its rows.
    """
    groups = {"": shares}
    if shares.index.nlevels > 1:
        groups = {str(name): rows.droplevel("benchmark") for name, rows in shares.groupby("benchmark", sort=False)}
    place, ticks = 0.0, {}
    for benchmark, rows in groups.items():
        if benchmark:
            axes.text(0.005, place, benchmark, va="center", fontweight="bold", fontsize="small")
            place += 0.8
        for name, row in rows.iterrows():
            _stack(axes, place, row)
            ticks[place] = str(name)
            place += 1
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(place - 0.4, -0.5)
    axes.set(xlim=(0, 1), xlabel="share of steps")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = [label for label in LABEL_COLORS if label in shares and shares[label].sum() > 0]
    handles = [Patch(color=LABEL_COLORS[label], label=label) for label in shown]
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(shown), handlelength=1, fontsize=8
    )


def _stack(axes: Axes, place: float, row: pd.Series) -> None:
    left = 0.0
    for label, color in LABEL_COLORS.items():
        share = row.get(label, 0.0)
        axes.barh(place, share, 0.8, left, color=color)
        # Narrower parts have no room for their number.
        if share >= 0.07:
            axes.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize="small")
        left += share


def plot_semantic_density(axes: Axes, samples_by_model: Mapping[str, pd.DataFrame]) -> None:
    """
    Plot tokens per semantic step of each completion (Step-GRPO, eq. 9), one box per model.

    A box spans the middle half of the completions and shows the median. Whiskers end at the last completion within 1.5
    box lengths; completions beyond that are not shown.

    Args:
        axes ([`~matplotlib.axes.Axes`]), samples_by_model (`Mapping[str, DataFrame]`):
            The axes to draw on, and the results of [`~step_trl.evaluation.evaluate`] by model.
    """
    densities = [(samples["tokens"] / samples["steps"]).to_numpy() for samples in samples_by_model.values()]
    boxes = axes.boxplot(densities, showfliers=False, patch_artist=True, widths=0.5, medianprops={"color": "black"})
    for box, color in zip(boxes["boxes"], cycle(COLORS), strict=False):
        box.set(facecolor=color, alpha=0.6)
    names = list(samples_by_model)
    crowded = len(names) * max(map(len, names), default=0) > 40
    rotation: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(1, len(names) + 1), names, **rotation)
    axes.set_ylabel("tokens per step")
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")


def evaluation_report(
    path: Path, tables: Mapping[str, pd.DataFrame], samples: Mapping[str, pd.DataFrame] | None = None
) -> None:
    """
    Draw the figure of an evaluation to a PNG file: accuracy against tokens, and semantic density if there are samples.

    See [`plot_accuracy_against_tokens`] and [`plot_semantic_density`].
    """
    with matplotlib.rc_context(STYLE):
        panels = 1 if samples is None else 2
        figure = Figure(figsize=(1 + 5 * panels, 3.6), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        plot_accuracy_against_tokens(axes[0], tables)
        if samples is not None:
            plot_semantic_density(axes[1], samples)
        figure.savefig(path)


def training_report(path: Path, histories: Mapping[str, History], accuracy: str) -> None:
    """
    Draw the figure of trainings to a PNG file: the dynamics of each, and entropy and KL if all trainings logged them.

    See [`plot_training`] and [`plot_training_dynamics`], for which `accuracy` is the name of the logged metric.
    """
    labels = {"entropy": "entropy, nats", "kl": "KL from the reference, nats"}
    metrics = [
        key for key in labels if all(any(entry.get(key) is not None for entry in rows) for rows in histories.values())
    ]
    number = len(histories) + len(metrics)
    rows = -(-number // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * min(number, 3), 3.4 * rows), layout="constrained")
        # Each row takes the whole width of the figure, so that there are no empty places.
        lengths = [number // rows + (row < number % rows) for row in range(rows)]
        parts = zip(figure.subfigures(rows, 1, squeeze=False)[:, 0], lengths, strict=True)
        panels = chain.from_iterable(part.subplots(1, length, squeeze=False)[0] for part, length in parts)
        for (name, history), panel in zip(histories.items(), panels, strict=False):
            plot_training_dynamics(panel, history, accuracy)
            panel.set_title(name)
        for key, panel in zip(metrics, panels, strict=True):
            plot_training(panel, histories, key, labels[key])
            panel.legend()
        figure.savefig(path)


def demo_report(path: Path, tables: Mapping[str, pd.DataFrame], histories: Mapping[str, History], reward: str) -> None:
    """
    Draw the demo's figure to a PNG file: accuracy against tokens, and accuracy and length of the rollouts in training.

    See [`plot_accuracy_against_tokens`] and [`plot_training`]. `reward` is the name of the logged accuracy.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        plot_accuracy_against_tokens(left, tables)
        plot_training(middle, histories, reward, "accuracy of training rollouts")
        plot_training(right, histories, "completions/mean_length", "tokens per training rollout")
        left.set_title("held-out problems")
        middle.set_title("training: accuracy")
        right.set_title("training: length")
        right.set_ylim(bottom=0)
        middle.legend()
        figure.savefig(path)
