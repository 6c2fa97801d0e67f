"""Budget rewards against numbers worked by hand and against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.rewards import l1_exact_reward, l1_max_reward, lapo_internalization_reward, soft_overlong_reward


def test_soft_overlong_by_hand():
    rewards = soft_overlong_reward(torch.tensor([10, 80, 90, 100, 101]), 100)
    torch.testing.assert_close(rewards, torch.tensor([0, 0, -0.5, -1.0, -1.0]))
    assert soft_overlong_reward(torch.tensor([75]), 100, 50).tolist() == [-0.5]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(5, 200), st.data())
def test_soft_overlong_is_piecewise_linear(lengths, limit, data):
    cache = data.draw(st.none() | st.integers(1, limit))
    width = limit // 5 if cache is None else cache
    expected = [max(-1.0, min(0.0, (limit - width - length) / width)) for length in lengths]
    torch.testing.assert_close(soft_overlong_reward(torch.tensor(lengths), limit, cache), torch.tensor(expected))


def test_l1_exact_by_hand():
    rewards = l1_exact_reward(torch.tensor([100, 300, 200]), torch.tensor([1, 1, 0]), torch.tensor([200, 200, 200]))
    torch.testing.assert_close(rewards, torch.tensor([0.97, 0.97, 0.0]))  # too short costs as much as too long


def test_l1_max_by_hand():
    lengths, targets = torch.tensor([1000, 0, 2000, 9000, 10]), torch.tensor([1000, 1000, 1000, 1000, 9000])
    rewards = l1_max_reward(lengths, torch.ones(5), targets)
    torch.testing.assert_close(rewards, torch.tensor([0.5, 0.65, 0.35, 0.0, 1.0]))
    assert l1_max_reward(lengths, torch.zeros(5), targets).tolist() == [0] * 5


def test_lapo_internalization_by_hand():
    lengths, targets = torch.tensor([500, 620, 500, 5000]), torch.full((4,), 500)
    rewards = lapo_internalization_reward(lengths, torch.tensor([1, 1, 0, 1]), targets)
    torch.testing.assert_close(rewards, torch.tensor([1.8, 1 + 0.8 * math.exp(-0.5), 0.0, 1.0]))


@pytest.mark.parametrize("reward", [l1_exact_reward, l1_max_reward, lapo_internalization_reward])
def test_there_is_a_target_for_each(reward):
    with pytest.raises(ValueError, match="targets: 3 lengths, 3 correct and 2 targets"):
        reward(torch.ones(3), torch.ones(3), torch.ones(2))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 9000), st.booleans(), st.integers(1, 9000)), min_size=1, max_size=8))
def test_equal_plain_loops(rows):
    tensors = [torch.tensor(column) for column in zip(*rows, strict=True)]
    tensors[0] = tensors[0].double()
    expected = {
        l1_exact_reward: [right - 0.0003 * abs(target - length) for length, right, target in rows],
        l1_max_reward: [
            min(1, max(0, 0.5 + 0.00015 * (target - length))) if right else 0 for length, right, target in rows
        ],
        lapo_internalization_reward: [
            1 + 0.8 * math.exp(-((length - target) ** 2) / (2 * 120**2)) if right else 0
            for length, right, target in rows
        ],
    }
    for reward, values in expected.items():
        torch.testing.assert_close(reward(*tensors), torch.tensor(values, dtype=torch.float64))
