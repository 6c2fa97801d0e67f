"""Pictures of results, all in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
MARKERS = "sD^vP*X<>p"
COLORS = ("#4d4d4d", "#1b6ca8", "#c8553d", "#3a7d44", "#8e6c8a", "#b8860b")


def plot_accuracy_against_tokens(axes: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    """
    Accuracy against mean tokens, one colour per model: a large point overall, a small mark per benchmark.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Where to draw.
        tables (`Mapping[str, DataFrame]`):
            Model name to the result of [`~step_trl.evaluation.summarize`].
    """
    for color, (name, table) in zip(COLORS, tables.items(), strict=False):
        benchmarks, overall = table.drop("overall"), table.loc["overall"]
        for marker, (_, row) in zip(MARKERS, benchmarks.iterrows(), strict=False):
            axes.scatter(row["tokens"], row["accuracy"], s=18, marker=marker, color=color, alpha=0.6)
        axes.scatter(overall["tokens"], overall["accuracy"], s=90, color=color, label=name, zorder=3)
    names = next(iter(tables.values())).index.drop("overall")
    for marker, benchmark in zip(MARKERS, names, strict=False):
        axes.scatter([], [], s=18, marker=marker, color="#999999", label=str(benchmark))
    axes.set(xlabel="mean tokens per completion", ylabel="accuracy")
    axes.set_xlim(left=0)
    axes.legend(loc="lower left", fontsize=7)


def plot_training(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, label: str) -> None:
    """
    One logged quantity over training steps.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Where to draw.
        histories (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Model name to `trainer.state.log_history`.
        key (`str`):
            Metric of the log.
        label (`str`):
            What it is, for the axis.
    """
    # The first colour is the vanilla model's, which is not trained.
    for color, (name, history) in zip(COLORS[1:], histories.items(), strict=False):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        smooth = pd.Series(values, dtype=float).rolling(5, min_periods=1, center=True).mean()
        axes.plot(steps, smooth, color=color, label=name)
    axes.set(xlabel="update", ylabel=label)


def evaluation_report(path: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """
    The picture of an evaluation: accuracy against tokens.

    Args:
        path (`Path`):
            PNG to write.
        tables (`Mapping[str, DataFrame]`):
            As in [`plot_accuracy_against_tokens`].
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        plot_accuracy_against_tokens(figure.subplots(), tables)
        figure.savefig(path)


def demo_report(
    path: Path, tables: Mapping[str, pd.DataFrame], histories: Mapping[str, Sequence[Mapping[str, float]]], reward: str
) -> None:
    """
    The demo's picture: accuracy against tokens, and accuracy and length of the rollouts over training.

    Args:
        path (`Path`):
            PNG to write.
        tables (`Mapping[str, DataFrame]`), histories (`Mapping`):
            As in [`plot_accuracy_against_tokens`] and [`plot_training`].
        reward (`str`):
            Key of the accuracy in the histories.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
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
