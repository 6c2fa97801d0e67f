"""Pictures: what is drawn, and that nothing covers anything else."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from step_trl.report import (
    evaluation_report,
    pareto_front,
    plot_accuracy_against_tokens,
    plot_composition,
    plot_semantic_density,
    plot_training,
    plot_training_dynamics,
    training_report,
)
from step_trl.report.figures import COLORS, STYLE


ACCURACY, LENGTH = "rewards/math_accuracy_reward/mean", "completions/mean_length"
FEW = st.integers(0, 4)


@given(st.dictionaries(st.text(max_size=3), st.tuples(FEW, FEW), max_size=8))
def test_pareto_front(points):
    def beaten(one):
        return any(
            other[0] <= one[0] and other[1] >= one[1] and other != one for other in points.values()
        )  # fmt: skip

    front = pareto_front(points)
    assert sorted(front) == sorted(name for name, point in points.items() if not beaten(point))
    line = [points[name] for name in front]
    assert line == sorted(line)


@pytest.fixture
def axes(tmp_path):
    """Axes in our style; the picture must be written without an error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 4), layout="constrained")
        yield figure.subplots()
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def overlapping(texts, figure):
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return [(one, other) for place, one in enumerate(boxes) for other in boxes[:place] if one.overlaps(other)]


def table(tokens, accuracy):
    return pd.DataFrame({"tokens": [tokens, tokens], "accuracy": [accuracy, accuracy]}, index=["easy", "overall"])


def test_accuracy_against_tokens(axes):
    tables = {f"model {place}": table(100 * place + 100, 0.5) for place in range(8)}
    tables |= {"accurate": table(700, 0.9), "short": table(50, 0.2)}
    plot_accuracy_against_tokens(axes, tables)
    [front] = axes.lines
    assert front.get_xydata().tolist() == [[50, 0.2], [100, 0.5], [700, 0.9]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [*tables, "Pareto front", "easy"] and len(COLORS) >= len(tables)
    axes.figure.draw_without_rendering()
    assert not axes.get_legend().get_window_extent().overlaps(axes.patch.get_window_extent())


def test_every_benchmark_is_drawn(axes):
    """More of them than any paper has, each with a mark of its own."""
    names = [f"benchmark {number}" for number in range(14)]
    rows = pd.DataFrame({"tokens": 100.0, "accuracy": 0.5}, index=[*names, "overall"])
    plot_accuracy_against_tokens(axes, {"model": rows})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["model", *names]
    marks = {tuple(points.get_paths()[0].vertices.flatten().round(3)) for points in axes.collections[:14]}
    assert len(marks) == 14


def test_no_front_of_one_model(axes):
    plot_accuracy_against_tokens(axes, {"better": table(100, 0.9), "worse": table(200, 0.5)})
    assert not axes.lines


def test_evaluation_report(tmp_path):
    evaluation_report(tmp_path / "report.png", {"a": table(100, 0.5), "b": table(200, 0.6)})
    assert (tmp_path / "report.png").stat().st_size > 5000


@pytest.fixture
def shares():
    index = pd.MultiIndex.from_product([["vanilla", "ours"], ["easy", "overall"]], names=["model", "benchmark"])
    columns = {"forward": 0.25, "verification": [0.25, 0.5, 0.7, 0.7], "redundancy": [0.5, 0.25, 0.05, 0.05]}
    return pd.DataFrame({**columns, "unknown": 0.0}, index=index)


def test_composition_of_models(axes, shares):
    plot_composition(axes, shares)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["vanilla", "ours", "vanilla", "ours"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["easy", "25%", "25%", "50%", "25%", "70%", "overall", "25%", "50%", "25%", "25%", "70%"]
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(4)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward", "verification", "redundancy"]
    assert not overlapping([*axes.texts, *axes.get_yticklabels(), *axes.get_legend().get_texts()], axes.figure)


def test_composition_of_one_benchmark(axes, shares):
    plot_composition(axes, shares.xs("overall", level="benchmark").assign(redundancy=0, unknown=0.05))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["vanilla", "ours"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward", "verification", "unknown"]


@pytest.mark.parametrize("names", [("vanilla", "ours"), tuple(f"DeepSeek-R1-Distill-Qwen-{size}B" for size in "147")])
def test_semantic_density(axes, names):
    tokens = np.array([10, 20, 30, 40, 50, 10_000])
    samples = pd.DataFrame({"tokens": 2 * tokens, "steps": 2})
    plot_semantic_density(axes, dict.fromkeys(names, samples))
    assert [text.get_text() for text in axes.get_xticklabels()] == list(names)
    medians = [line for line in axes.lines if line.get_color() == "black" and len(set(line.get_ydata())) == 1]
    assert {35.0} <= {float(line.get_ydata()[0]) for line in medians}
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] < 100, "outliers are hidden"
    if len(names) == 2:
        assert not overlapping(axes.get_xticklabels(), axes.figure)


@pytest.fixture
def history():
    entries = [
        {"step": step, ACCURACY: 0.5 + step / 100, LENGTH: 200.0 - step, "entropy": 0.1} for step in range(1, 11)
    ]
    return [*entries, {"step": 10, "train_loss": 0.1}]


def test_training_dynamics(axes, history):
    other = plot_training_dynamics(axes, history)
    assert axes.lines[0].get_xydata()[[0, -1]].tolist() == [[1, 0.51], [10, 0.6]]
    assert other.lines[0].get_xydata()[[0, -1]].tolist() == [[1, 199], [10, 190]]
    assert (axes.get_ylabel(), other.get_ylabel(), other.get_ylim()[0]) == ("accuracy", "tokens per rollout", 0)
    with pytest.raises(ValueError, match=r"history: 'reward' was not logged.*'entropy'"):
        plot_training_dynamics(axes, history, accuracy="reward")


def test_training_of_many_models(axes, history):
    plot_training(axes, {str(place): history for place in range(15)}, "entropy", "entropy")
    assert len(axes.lines) == 30


@pytest.mark.parametrize(("trainings", "logged"), [(1, ["entropy"]), (2, ["entropy", "kl"]), (4, ["kl"])])
def test_the_picture_of_trainings_has_no_empty_place(tmp_path, history, trainings, logged):
    entries = [entry | {"entropy": None, "kl": None} | dict.fromkeys(logged, 0.1) for entry in history[:-1]]
    training_report(tmp_path / "training.png", {str(place): entries for place in range(trainings)}, ACCURACY)
    drawn = matplotlib.image.imread(tmp_path / "training.png")[..., :3].min(axis=2) < 0.99
    rows = -(-(trainings + len(logged)) // 3)
    for row in np.array_split(drawn, rows):
        columns = np.flatnonzero(row.any(axis=0))
        blank = np.diff([0, *columns, row.shape[1]])  # widths without a mark: spaces between panels, margins
        assert blank.max() < 0.1 * row.shape[1]
