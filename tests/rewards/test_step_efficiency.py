"""The efficiency term against numbers worked by hand and against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.rewards import step_efficiency_reward


def reference(steps, correct, num_generations, beta, baseline):
    rewards = []
    for start in range(0, len(steps), num_generations):
        group = range(start, start + num_generations)
        counted = [steps[i] for i in group if correct[i] or baseline == "all"]
        for i in group:
            mean = sum(counted) / len(counted) if counted else None
            rewards.append(-beta * math.tanh((steps[i] - mean) / mean) if correct[i] else 0.0)
    return rewards


def test_by_hand():
    # mean steps of the correct ones: (1 + 2 + 3) / 3 = 2 and 5; the third group has none
    steps = torch.tensor([1, 2, 3, 9, 5, 7, 1, 2, 3, 4, 5, 6])
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]).bool()
    rewards = step_efficiency_reward(steps, correct, num_generations=4)
    tanh_half = 0.46211715726
    expected = [0.5 * tanh_half, 0, -0.5 * tanh_half, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_baseline_of_all_and_beta():
    steps, correct = torch.tensor([2, 6]), torch.tensor([True, False])  # mean 4
    rewards = step_efficiency_reward(steps, correct, 2, beta=1.0, baseline="all")
    torch.testing.assert_close(rewards, torch.tensor([math.tanh(0.5), 0.0]))
    assert step_efficiency_reward(steps, correct, 2, beta=1.0).tolist() == [0.0, 0.0]


def test_no_group_knows_another():
    steps = torch.tensor([1, 3, 10, 30])
    rewards = step_efficiency_reward(steps, torch.ones(4, dtype=torch.bool), 2)
    torch.testing.assert_close(rewards[:2], rewards[2:])


def test_types_and_sizes():
    correct = torch.ones(2, dtype=torch.bool)
    assert step_efficiency_reward(torch.tensor([1, 2]), correct, 2).dtype == torch.float32
    assert step_efficiency_reward(torch.tensor([1.0, 2.0], dtype=torch.float64), correct, 2).dtype == torch.float64
    assert step_efficiency_reward(torch.zeros(0), torch.zeros(0), 4).shape == (0,)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="baseline: 'none'"):
        step_efficiency_reward(torch.ones(2), torch.ones(2), 2, baseline="none")
    with pytest.raises(ValueError, match=r"num_steps: 3 completions.*num_generations=2"):
        step_efficiency_reward(torch.ones(3), torch.ones(3), 2)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.floats(0, 2), st.sampled_from(["correct", "all"]))
def test_equals_the_reference(data, num_generations, groups, beta, baseline):
    size = num_generations * groups
    steps = data.draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
    correct = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    rewards = step_efficiency_reward(
        torch.tensor(steps, dtype=torch.float64), torch.tensor(correct), num_generations, beta, baseline
    )
    expected = torch.tensor(reference(steps, correct, num_generations, beta, baseline), dtype=torch.float64)
    torch.testing.assert_close(rewards, expected)
