"""The papers' metrics, by hand, and against their tables."""

import pandas as pd
import pytest

from step_trl.evaluation import accuracy_efficiency_score, compression_rate, pass_at_1, summarize


def test_pass_at_1():
    assert pass_at_1([[True, False], [True, True], [False, False, False, True]]) == pytest.approx((0.5 + 1 + 0.25) / 3)
    with pytest.raises(ValueError, match="correct: "):
        pass_at_1([[True], []])


def test_compression_rate_is_the_mean_of_the_tasks_ratios():
    assert compression_rate({"a": 50, "b": 300}, {"a": 100, "b": 400}) == pytest.approx((0.5 + 0.75) / 2)
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] differ"):
        compression_rate({"a": 1}, {"b": 1})


@pytest.mark.parametrize(
    ("accuracy", "tokens", "score"),
    [
        (0.8, 600, 0.4),  # as accurate, 40 % shorter
        (0.88, 600, 0.4 + 3 * 0.1),
        (0.72, 600, 0.4 - 5 * 0.1),
        (0.8, 1200, -0.2),
    ],
)
def test_accuracy_efficiency_score(accuracy, tokens, score):
    assert accuracy_efficiency_score(accuracy, tokens, 0.8, 1000) == pytest.approx(score)


def test_accuracy_efficiency_score_weights():
    assert accuracy_efficiency_score(0.9, 500, 1.0, 1000, alpha=2, gamma=10) == pytest.approx(2 * 0.5 - 10 * 0.1)
    with pytest.raises(ValueError, match="base_accuracy, base_tokens: 0 and 10"):
        accuracy_efficiency_score(0.5, 10, 0, 10)


# SAS's tables (arXiv 2604.24003): accuracy in %, tokens and AES, relative to DeepScaleR. The paper itself is not to be
# had here; the numbers are those of a public reading note. Three rows of its table for mathematics (L1-Max, LAPO-I,
# ThinkPrune) do not follow from their own accuracy and tokens, and are left out.
MATHEMATICS = (52.37, 5118)
GENERAL = (37.44, 4416)


@pytest.mark.parametrize(
    ("base", "accuracy", "tokens", "printed"),
    [
        pytest.param(MATHEMATICS, 53.61, 3775, 0.33, id="GRPO-4K"),
        pytest.param(MATHEMATICS, 54.54, 3407, 0.46, id="SAS"),
        pytest.param(MATHEMATICS, 53.52, 3259, 0.43, id="SAS, r = 0.1"),
        pytest.param(MATHEMATICS, 53.06, 3482, 0.36, id="SAS, r = 0.9"),
        pytest.param(GENERAL, 36.55, 2496, 0.32, id="GRPO-4K, general"),
        pytest.param(GENERAL, 37.22, 2242, 0.46, id="L1-Max, general"),
        pytest.param(GENERAL, 37.77, 3331, 0.27, id="LAPO-I, general"),
        pytest.param(GENERAL, 37.62, 3127, 0.31, id="ThinkPrune-4k, general"),
        pytest.param(GENERAL, 38.30, 2729, 0.45, id="SAS, general"),
    ],
)
def test_the_scores_of_the_paper(base, accuracy, tokens, printed):
    assert round(accuracy_efficiency_score(accuracy, tokens, *base), 2) == printed


def test_the_averages_of_the_paper():
    """SAS's row, benchmark by benchmark, comes to its printed overall accuracy, tokens and AES."""
    tasks = ["AIME24", "AIME25", "MATH", "AMC", "OlympiadBench"]
    samples = {
        name: pd.DataFrame(
            {"benchmark": tasks, "problem": 0, "correct": accuracies, "tokens": tokens, "steps": 1}, index=range(5)
        )
        for name, accuracies, tokens in (
            ("vanilla", [0.3375, 0.2688, 0.8636, 0.6762, 0.4723], [6755, 6444, 2809, 4761, 4824]),
            ("SAS", [0.3979, 0.2667, 0.8658, 0.7146, 0.4819], [4876, 4295, 1768, 3090, 3008]),
        )
    }
    overall = summarize(samples["SAS"], samples["vanilla"], resamples=10).loc["overall"]
    assert (round(100 * overall["accuracy"], 2), round(overall["tokens"])) == (54.54, 3407)
    assert round(overall["aes"], 2) == 0.46
