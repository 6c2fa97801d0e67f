"""SPAE's advantages, against the numbers of its specification and a brute-force version."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_trl.advantages import (
    credit_steps,
    potential_bonuses,
    saturation_factors,
    step_potential,
    steps_at_cuts,
)


NAN = math.nan
SHARES = st.floats(0, 1, width=32)


def test_worked_numbers():
    accuracy, confidence = torch.tensor([[0.1, 0.5, 0.9, 0.95]]), torch.tensor([[0.2, 0.6, 0.9, 0.95]])
    potentials = step_potential(accuracy, confidence)
    assert potentials[0].tolist() == pytest.approx([-0.12, 0.1, 0.765, 0.87875])
    assert potentials.diff()[0].tolist() == pytest.approx([0.22, 0.665, 0.11375])
    bonuses = potential_bonuses(potentials)
    assert bonuses[0].tolist() == pytest.approx([0, -0.431046, 1.074664, -0.643618, 0], abs=1e-6)
    raised = [math.exp((change - 0.11375) / (0.665 - 0.11375)) for change in (0.22, 0.665, 0.11375)]
    assert raised == pytest.approx([1.2125720493, 2.7182818285, 1])
    factors = saturation_factors(torch.tensor([[0.91, 0.95, 0.99]]))
    assert factors[0].tolist() == pytest.approx([1, 0.68394, 0.56767, 0.52489], abs=5e-6)


def test_certainty_is_worth_1_if_it_is_right():
    values = step_potential(torch.tensor([1.0, 0, 0, 1]), torch.tensor([1.0, 1, 0, 0]))
    assert values.tolist() == [1, -1, 0, 0.5]
    assert step_potential(torch.tensor(0.5), torch.tensor(0.25), [2, 4, 8]) == 2 * 0.125 + 2 - 2


def test_only_potentials_above_the_threshold_saturate():
    factors = saturation_factors(torch.tensor([[0.5, 0.75, -1, 0.8]]), threshold=0.5, penalty=1.0)
    assert factors[0].tolist() == pytest.approx([1, 1, math.exp(-1), math.exp(-1), math.exp(-2)])
    assert saturation_factors(torch.full((2, 3), NAN)).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("potentials", [[[]], [[0.5]], [[NAN, NAN], [0.5, NAN]], [[0.1, 0.3], [0.2, 0.4]]])
def test_without_different_changes_there_is_no_bonus(potentials):
    rows = torch.tensor(potentials, dtype=torch.float64)
    bonuses = potential_bonuses(rows)
    assert bonuses.shape == (len(potentials), rows.size(1) + 1) and bonuses.abs().max() < 1e-12


def test_tokens_belong_to_the_step_that_they_end():
    assert steps_at_cuts([2, 5], 7, 9).tolist() == [0, 0, 1, 1, 1, 2, 2, -1, -1]
    assert steps_at_cuts([], 2, 3).tolist() == [0, 0, -1]
    assert steps_at_cuts([3], 3, 3).tolist() == [0, 0, 0]
    assert steps_at_cuts([], 0, 2).tolist() == [-1, -1]


def brute_force(advantages, potentials, steps, weight, threshold, penalty):
    """The advantages of tokens, step by step."""
    changes = {(row, k): v[k] - v[k - 1] for row, v in enumerate(potentials) for k in range(1, len(v))}
    low, high = min(changes.values(), default=0), max(changes.values(), default=0)
    differ = high - low >= 1e-6
    raised = {place: math.exp((change - low) / (high - low)) if differ else 1 for place, change in changes.items()}
    mean = sum(raised.values()) / max(1, len(raised))
    found = []
    for row, (advantage, values) in enumerate(zip(advantages, potentials, strict=True)):
        for step in steps[row]:
            if step < 0:
                found.append(advantage)
                continue
            saturated = sum(value > threshold for value in values[:step])
            factor = 1 - penalty * (1 - math.exp(-saturated))
            found.append(advantage * factor + weight * (raised.get((row, step), mean) - mean))
    return found


@given(st.data())
def test_advantages_equal_brute_force(data):
    rows = data.draw(st.lists(st.lists(st.tuples(SHARES, SHARES), max_size=5), min_size=1, max_size=4))
    advantages = data.draw(st.lists(st.floats(-2, 2), min_size=len(rows), max_size=len(rows)))
    weight, penalty = data.draw(SHARES), data.draw(SHARES)
    widest = max(map(len, rows))
    measured = torch.full((len(rows), widest, 2), NAN, dtype=torch.float64)
    for row, values in enumerate(rows):
        measured[row, : len(values)] = torch.tensor(values, dtype=torch.float64).view(-1, 2)
    potentials = step_potential(measured[..., 0], measured[..., 1])
    lists = [[1.5 * a * c + 0.5 * a - c for a, c in values] for values in rows]
    cuts = [sorted(data.draw(st.sets(st.integers(1, 9), min_size=len(v), max_size=len(v)))) for v in rows]
    thoughts = [data.draw(st.integers(max(of_row, default=0), 10)) for of_row in cuts]
    steps = torch.stack([steps_at_cuts(c, thought, 12) for c, thought in zip(cuts, thoughts, strict=True)])
    for row, (of_row, thought) in enumerate(zip(cuts, thoughts, strict=True)):
        expected = [sum(cut <= place for cut in of_row) if place < thought else -1 for place in range(12)]
        assert steps[row].tolist() == expected
    found = credit_steps(
        torch.tensor(advantages, dtype=torch.float64),
        steps,
        saturation_factors(potentials, 0.3, penalty),
        potential_bonuses(potentials),
        weight,
    )
    if any(abs(value - 0.3) < 1e-9 for values in lists for value in values):
        return  # rounding decides
    expected = brute_force(advantages, lists, steps.tolist(), weight, 0.3, penalty)
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)
