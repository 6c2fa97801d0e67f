"""Mean relative accuracy: the numbers of `methods.md` (VerIPO, arXiv 2505.19000)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_trl.rewards import mean_relative_accuracy, relative_accuracy_reward


@pytest.mark.parametrize(
    ("predicted", "gold", "score"),
    [
        (95, 100, 1.0),
        (110, 100, 0.9),
        (79, 100, 0.6),
        (80, 100, 0.6),
        (3, 4, 0.6),
        (7, 10, 0.5),
        (50, 100, 0.1),
        (49, 100, 0),
    ],
)
def test_scores_of_the_released_code(predicted, gold, score):
    assert mean_relative_accuracy(predicted, gold, strict_float=True) == score


@pytest.mark.parametrize(
    ("predicted", "gold", "score"),
    [(80, 100, 0.7), (95, 100, 1.0), (7, 10, 0.5), (0, 0, 1.0), (1, 0, 0.0), (-80, -100, 0.7), (80, -100, 0.0)],
)
def test_scores_without_its_traps(predicted, gold, score):
    assert mean_relative_accuracy(predicted, gold) == score


@given(st.integers(-200, 200), st.integers(1, 100), st.sampled_from([-1, 1]))
def test_scores_are_those_of_exact_arithmetic(predicted, gold, sign):
    # 20 * |p - g| <= (10 - k) * |g| for the k-th tolerance, from 50 % to 5 %
    expected = sum(20 * abs(predicted - sign * gold) <= (10 - k) * gold for k in range(10)) / 10
    assert mean_relative_accuracy(predicted, sign * gold) == expected


def test_rewards_of_answers_that_are_numbers():
    completions = [
        "<think>?</think><answer>80</answer>",
        r"\boxed{95}",
        "no idea",
        "<answer>red</answer>",
        "\\boxed{1/2}",
    ]
    assert relative_accuracy_reward(completions, ["100", "100", "100", "100", "0.5"]) == [0.7, 1.0, 0.0, 0.0, 1.0]
    assert relative_accuracy_reward([r"\boxed{1}"], ["red"]) == [None]
