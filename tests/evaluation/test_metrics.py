"""The papers' metrics, by hand."""

import pytest

from step_trl.evaluation import accuracy_efficiency_score, compression_rate, pass_at_1


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
