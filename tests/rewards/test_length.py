"""Length rewards against numbers worked by hand and against plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.rewards import (
    grpo_lambda_reward,
    kimi_length_reward,
    lapo_discovery_reward,
    s_grpo_reward,
    train_efficiently_reward,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def reference_kimi(lengths, correct, num_generations):
    rewards = []
    for start in range(0, len(lengths), num_generations):
        group = lengths[start : start + num_generations]
        for length, right in zip(group, correct[start : start + num_generations], strict=True):
            if max(group) == min(group):
                rewards.append(0.0)
                continue
            lam = 0.5 - (length - min(group)) / (max(group) - min(group))
            rewards.append(lam if right else min(0.0, lam))
    return rewards


def reference_lambda(lengths, correct, num_generations, percent, alpha):
    starts = range(0, len(lengths), num_generations)
    ranked = sorted(starts, key=lambda start: -sum(correct[start : start + num_generations]))
    top = ranked[: max(1, percent * len(ranked) // 100)]
    rewards = []
    for start in starts:
        group = range(start, start + num_generations)
        of_correct = [lengths[i] for i in group if correct[i]]
        for i in group:
            if not correct[i] or start not in top:
                rewards.append(float(correct[i]))
                continue
            std = statistics.pstdev(of_correct)
            z = (lengths[i] - statistics.mean(of_correct)) / std if std else 0.0
            rewards.append(1 - alpha * sigmoid(z))
    return rewards


def reference_train_efficiently(lengths, correct, ended, num_generations, alpha):
    rewards = []
    for start in range(0, len(lengths), num_generations):
        group = range(start, start + num_generations)
        counted = [lengths[i] for i in group if correct[i] and ended[i]]
        for i in group:
            if not (correct[i] and ended[i]):
                rewards.append(0.0)
                continue
            std = statistics.pstdev(counted)
            z = (lengths[i] - statistics.mean(counted)) / std if std else 0.0
            rewards.append(1 - alpha * sigmoid(z))
    return rewards


def reference_discovery(lengths, correct, num_generations):
    rewards = []
    for start in range(0, len(lengths), num_generations):
        group = range(start, start + num_generations)
        of_correct = sorted(lengths[i] for i in group if correct[i])
        for i in group:
            if not correct[i]:
                rewards.append(0.0)
                continue
            low, high = (quantile(of_correct, q) for q in (0.3, 0.7))
            far = 0 if low <= lengths[i] <= high else min(abs(lengths[i] - low), abs(lengths[i] - high))
            rewards.append(1 + 0.7 * max(0, 1 - far / 100))
    return rewards


def quantile(values, q):
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def test_kimi_by_hand():
    lengths = torch.tensor([100, 200, 300, 150, 7, 7, 7, 7])
    correct = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]).bool()
    rewards = kimi_length_reward(lengths, correct, 4)
    # 150 tokens are short for the group, which a wrong answer does not profit from
    torch.testing.assert_close(rewards, torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]))


def test_lambda_by_hand():
    # five groups of two, of which one is in the top: the first of the two that are all correct
    lengths = torch.tensor([10, 20, 100, 300, 10, 20, 5, 6, 1, 2])
    correct = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 0, 1]).bool()
    rewards = grpo_lambda_reward(lengths, correct, 2)
    short, long = 1 - 0.1 * sigmoid(-1), 1 - 0.1 * sigmoid(1)
    torch.testing.assert_close(rewards, torch.tensor([1, 0, short, long, 1, 1, 0, 0, 0, 1.0]))
    rewards = grpo_lambda_reward(lengths, correct, 2, top_ratio=0.4, alpha=1.0)
    short, long = 1 - sigmoid(-1), 1 - sigmoid(1)
    torch.testing.assert_close(rewards, torch.tensor([1, 0, short, long, short, long, 0, 0, 0, 1.0]))


def test_lambda_without_spread_costs_half_of_alpha():
    one = grpo_lambda_reward(torch.tensor([10, 90]), torch.tensor([True, False]), 2)
    torch.testing.assert_close(one, torch.tensor([0.95, 0.0]))
    equal = grpo_lambda_reward(torch.tensor([50, 50, 90]), torch.tensor([True, True, False]), 3)
    torch.testing.assert_close(equal, torch.tensor([0.95, 0.95, 0.0]))


def test_lambda_without_correct_completions():
    assert grpo_lambda_reward(torch.tensor([3, 4, 5, 6]), torch.zeros(4, dtype=torch.bool), 2).tolist() == [0.0] * 4


def test_lambda_takes_at_least_one_group_and_rounds_down():
    lengths, correct = torch.tensor([10, 20] * 10), torch.ones(20, dtype=torch.bool)
    for top_ratio, groups in ((0.01, 1), (0.1, 1), (0.29, 2), (0.3, 3), (0.1 * 3, 3), (1.0, 10)):
        rewards = grpo_lambda_reward(lengths, correct, 2, top_ratio=top_ratio)
        assert (rewards.view(10, 2) < 1).all(1).tolist() == [True] * groups + [False] * (10 - groups)


def test_train_efficiently_by_hand():
    lengths = torch.tensor([100, 300, 50, 999, 10, 20, 30, 40])
    correct = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool()
    ended = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]).bool()
    rewards = train_efficiently_reward(lengths, correct, 4, ended)
    short, long = 1 - 0.1 * sigmoid(-1), 1 - 0.1 * sigmoid(1)
    torch.testing.assert_close(rewards, torch.tensor([short, long, 0, 0, 0, 0, 0.95, 0]))  # one correct: sigmoid of 0
    everywhere = train_efficiently_reward(lengths, correct, 4, alpha=0.4)
    assert everywhere[3] > 0 and everywhere[:2].min() > 1 - 0.4 / 2


def test_lapo_discovery_by_hand():
    # of 100, 200, ..., 1100 the quantiles are 400 and 800
    lengths = torch.tensor([*range(100, 1200, 100), 5])
    correct = torch.tensor([True] * 11 + [False])
    rewards = lapo_discovery_reward(lengths, correct, 12)
    torch.testing.assert_close(rewards, torch.tensor([1, 1, 1, 1.7, 1.7, 1.7, 1.7, 1.7, 1, 1, 1, 0]))
    rewards = lapo_discovery_reward(lengths, correct, 12, decay=200)
    torch.testing.assert_close(rewards[[2, 8, 9]], torch.tensor([1.35, 1.35, 1.0]))
    assert lapo_discovery_reward(torch.tensor([7, 9]), torch.tensor([True, False]), 2).tolist() == pytest.approx(
        [1.7, 0]
    )
    assert lapo_discovery_reward(torch.tensor([7, 9]), torch.zeros(2), 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"low, high: 0\.8 and 0\.7"):
        lapo_discovery_reward(lengths, correct, 12, low=0.8)


def reference_s_grpo(correct, num_generations, decay):
    rewards = []
    for place, right in enumerate(correct):
        earlier = correct[place - place % num_generations : place]
        rewards.append(decay ** sum(earlier) if right else 0.0)
    return rewards


def test_s_grpo_by_hand():
    correct = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    expected = torch.tensor([0, 1, 0.5, 0, 0.25, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    torch.testing.assert_close(s_grpo_reward(correct, 5), expected)
    assert s_grpo_reward(torch.ones(3), 3, decay=0.9).tolist() == pytest.approx([1, 0.9, 0.81])
    with pytest.raises(ValueError, match="3 completions"):
        s_grpo_reward(torch.ones(3), 2)


@pytest.mark.parametrize(
    "reward", [kimi_length_reward, grpo_lambda_reward, train_efficiently_reward, lapo_discovery_reward]
)
def test_sizes_are_checked(reward):
    with pytest.raises(ValueError, match=r"lengths: 3 completions.*num_generations=2"):
        reward(torch.ones(3), torch.ones(3), 2)


@pytest.mark.parametrize("top_ratio", [0.0, 1.1, float("nan")])
def test_top_ratio_is_checked(top_ratio):
    with pytest.raises(ValueError, match="top_ratio"):
        grpo_lambda_reward(torch.ones(2), torch.ones(2), 2, top_ratio=top_ratio)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 5), st.integers(1, 8), st.integers(1, 100))
def test_equal_the_references(data, num_generations, groups, percent):
    size = num_generations * groups
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=size, max_size=size))
    correct = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    tensors = torch.tensor(lengths, dtype=torch.float64), torch.tensor(correct), num_generations
    expected = torch.tensor(reference_kimi(lengths, correct, num_generations), dtype=torch.float64)
    torch.testing.assert_close(kimi_length_reward(*tensors), expected)
    expected = torch.tensor(reference_lambda(lengths, correct, num_generations, percent, 0.1), dtype=torch.float64)
    torch.testing.assert_close(grpo_lambda_reward(*tensors, top_ratio=percent / 100), expected)
    ended = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    expected = reference_train_efficiently(lengths, correct, ended, num_generations, 0.1)
    rewards = train_efficiently_reward(*tensors, torch.tensor(ended))
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))
    longer = [10 * length for length in lengths]  # so that some are far from the others
    expected = torch.tensor(reference_discovery(longer, correct, num_generations), dtype=torch.float64)
    torch.testing.assert_close(lapo_discovery_reward(10 * tensors[0], *tensors[1:]), expected)
    expected = torch.tensor(reference_s_grpo(correct, num_generations, 0.5))
    torch.testing.assert_close(s_grpo_reward(tensors[1], num_generations), expected)
