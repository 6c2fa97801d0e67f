"""LEAD's balance of correctness and length, against the numbers of its specification and a brute-force version."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_trl.advantages import (
    Signal,
    batch_signal,
    correctness_share,
    group_advantages,
    length_efficiency,
    length_targets,
)


LENGTHS = torch.tensor([2000.0, 4000, 6000, 8000, 1000, 3000, 5000, 7000])
CORRECT = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()


def test_worked_numbers():
    targets = length_targets(LENGTHS, CORRECT, 4, 1000, 8000)
    assert targets.tolist() == [4000.0] * 4 + [7000.0] * 4
    efficiency = length_efficiency(LENGTHS, targets)
    expected = [0.5, 1, 0.5, 0, 0.1428571429, 0.4285714286, 0.7142857143, 1]
    assert efficiency.tolist() == pytest.approx(expected)
    correctness = batch_signal(CORRECT.float(), torch.ones(8).bool(), 4)
    of_length = batch_signal(efficiency, CORRECT, 4)
    assert correctness == pytest.approx((0.5, 0.50000001)) and of_length == pytest.approx((0.8333333333, 0.2357022816))
    share = correctness_share(correctness, of_length)
    assert share == pytest.approx(0.9549817028, abs=1e-7)
    weight = 0.95 * 0.5 + 0.05 * share
    assert weight == pytest.approx(0.5227490851, abs=1e-8)
    both = weight * group_advantages(CORRECT.float(), 4) + (1 - weight) * group_advantages(efficiency, 4)
    expected = [0.2613740198, 0.8458831984, 0.2613740198, -1.3686312381]
    expected += [-0.8158879701, -0.4462120032, -0.0765360364, 1.3386360097]
    assert both.tolist() == pytest.approx(expected, abs=2e-6)


@given(st.data(), st.integers(2, 4), st.integers(1, 4))
def test_signals_and_targets_equal_brute_force(data, size, groups):
    number = size * groups
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=number, max_size=number))
    correct = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    shortest, longest = sorted(data.draw(st.tuples(st.integers(1, 120), st.integers(1, 120))))
    rows = [list(zip(lengths, correct, strict=True))[i : i + size] for i in range(0, number, size)]
    targets = length_targets(torch.tensor(lengths).float(), torch.tensor(correct), size, shortest, longest)
    for row, target in zip(rows, targets.view(-1, size).tolist(), strict=True):
        right = [length for length, is_right in row if is_right]
        expected = min(max(statistics.mean(right), shortest), longest) if right else longest
        assert target == pytest.approx([expected] * size)
    efficiency = length_efficiency(torch.tensor(lengths).float(), targets)
    assert efficiency.tolist() == pytest.approx(
        [max(-1, 1 - abs(length - target) / target) for length, target in zip(lengths, targets.tolist(), strict=True)],
        abs=1e-5,
    )
    signal = batch_signal(efficiency, torch.tensor(correct), size)
    counted = [
        [value for value, is_right in zip(row.tolist(), right, strict=True) if is_right]
        for row, right in zip(efficiency.view(-1, size), torch.tensor(correct).view(-1, size).tolist(), strict=True)
    ]
    counted = [values for values in counted if values]
    if not counted:
        assert signal == (0, 0)
        return
    means = [statistics.mean(values) for values in counted]
    variance = statistics.mean(map(statistics.pvariance, counted)) + statistics.pvariance(means) + 1e-8
    assert signal == pytest.approx((statistics.mean(means), math.sqrt(variance)), abs=1e-6)


def test_the_share_follows_what_is_lacking():
    """All correct: only length is left to gain. None correct: only correctness."""
    assert correctness_share(Signal(1.0, 1e-4), Signal(0.2, 0.3)) == pytest.approx(0, abs=1e-6)
    assert correctness_share(Signal(0.0, 1e-4), Signal(0.0, 0.0)) == pytest.approx(1, abs=1e-6)
    assert correctness_share(Signal(0.5, 0.5), Signal(1.0, 1e-4)) == pytest.approx(1, abs=1e-6)
    assert correctness_share(Signal(0.0, 0.0), Signal(0.0, 0.0)) == 0
