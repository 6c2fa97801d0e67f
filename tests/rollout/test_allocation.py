"""The budgets of GVM: the numbers of `methods.md` (arXiv 2505.02391), and what no other allocation can improve."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.rollout import fill_batches, filter_ratios, gvm_weights, preserve_sum


NORMS = torch.tensor([2.0, 2.0, 2.0, 3.0], dtype=torch.float64)
RATES = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)


def rounded(ratios, total, *more):
    return preserve_sum(torch.tensor(ratios, dtype=torch.float64), total, *more).tolist()


def test_weights_of_the_paper():
    weights = gvm_weights(NORMS, RATES, 1e-3, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.9990007494, 2.8227871847, 3.9683789507, 0]).double())
    ratios = weights / weights.sum()
    torch.testing.assert_close(ratios, torch.tensor([0.2274132876, 0.3211301016, 0.4514566109, 0]).double())
    assert preserve_sum(ratios, 32).tolist() == [7, 10, 15, 0]


def test_filters_leave_out_easy_prompts():
    weights = gvm_weights(NORMS, RATES)
    kept = filter_ratios(weights / weights.sum(), RATES, 32, threshold=0.9, insufficient=1.0)
    torch.testing.assert_close(kept, torch.tensor([0, 0.4156557399, 0.5843442601, 0]).double())
    assert preserve_sum(kept, 32).tolist() == [0, 13, 19, 0]
    assert not filter_ratios(weights / weights.sum(), RATES, 32, insufficient=33.0).any()


@pytest.mark.parametrize(
    ("ratios", "total", "numbers"),
    [
        ([0.15, 0.17, 0.18, 0.5], 10, [1, 2, 2, 5]),
        ([0.26, 0.26, 0.26, 0.22], 10, [2, 3, 3, 2]),
        ([1 / 3] * 3, 10, [4, 3, 3]),
        ([0.25] * 4, 10, [3, 3, 2, 2]),
    ],
)
def test_rounding_preserves_the_sum(ratios, total, numbers):
    assert rounded(ratios, total) == numbers


def test_rounding_by_acceptance_rate_prefers_hard_prompts():
    rates = torch.tensor([0.9, 0.5, 0.1, 0.0])
    assert rounded([0.35, 0.33, 0.32, 0.0], 10, "accept_rate", rates) == [4, 3, 3, 0]  # nothing is missing
    assert rounded([1 / 3, 1 / 3, 1 / 3, 0.0], 10, "accept_rate", rates) == [3, 3, 4, 0]
    assert rounded([0.25, 0.375, 0.375, 0.0], 4, "accept_rate", rates) == [0, 2, 2, 0]
    with pytest.raises(ValueError, match="acceptance_rates: None"):
        rounded([0.5, 0.5], 3, "accept_rate")


def test_hard_prompts_get_more_unless_they_are_almost_never_solved():
    rates = torch.tensor([1 / 8, 1 / 2, 1], dtype=torch.float64)
    weights = gvm_weights(torch.ones(3).double(), rates)
    torch.testing.assert_close(weights, torch.tensor([2.7420424855, 1.4113935923, 0.9995003747]).double())
    assert preserve_sum(weights / weights.sum(), 24).tolist() == [13, 6, 5]
    hopeless = gvm_weights(torch.ones(2).double(), torch.tensor([1e-6, 0.5]).double())
    assert hopeless[0] < hopeless[1]


def variance(numbers, norms, rates):
    return (norms**2 / (rates * numbers)).sum().item()


def test_the_variance_of_the_worked_example():
    norms, rates = NORMS[:3], RATES[:3]
    assert variance(torch.full((3,), 32 / 3), norms, rates) == pytest.approx(2.625)
    weights = gvm_weights(norms, rates, alpha=0.0)
    best = weights / weights.sum() * 32
    torch.testing.assert_close(best, torch.tensor([7.2493, 10.2521, 14.4986]).double(), rtol=0, atol=1e-4)
    assert variance(best, norms, rates) == pytest.approx(2.4356601718)


positive = st.floats(0.01, 1.0)


@given(st.lists(st.tuples(positive, positive, positive), min_size=1, max_size=8), st.integers(1, 100))
def test_no_other_allocation_has_less_variance(prompts, total):
    norms, rates, others = torch.tensor(prompts, dtype=torch.float64).T
    weights = gvm_weights(norms, rates, alpha=0.0)
    best = variance(weights / weights.sum() * total, norms, rates)
    assert best <= variance(others / others.sum() * total, norms, rates) * (1 + 1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 200), st.booleans())
def test_integers_are_close_to_their_shares(weights, total, by_rate):
    ratios = torch.tensor(weights, dtype=torch.float64)
    if not ratios.sum() > 0:
        return
    ratios /= ratios.sum()
    numbers = preserve_sum(ratios, total, "accept_rate" if by_rate else "residual", ratios.flip(0))
    assert numbers.sum() == total and (numbers >= 0).all()
    assert not numbers[ratios == 0].any()
    assert (numbers - ratios * total).abs().max() <= (1.5 if by_rate else 1) + 1e-9


@settings(max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 8))
def test_batches_hold_whole_groups_where_they_can(numbers, size):
    numbers[0] += -sum(numbers) % size
    order = fill_batches(torch.tensor(numbers), size)
    assert [order.count(prompt) for prompt in range(len(numbers))] == numbers
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for batch in batches:  # contiguous within a batch
        assert len(set(batch)) == 1 + sum(one != other for one, other in pairwise(batch))
    # A batch ends with at most one group that goes on in another.
    for place, batch in enumerate(batches):
        later = {prompt for other in batches[place + 1 :] for prompt in other}
        assert len(later & set(batch)) <= 1


def test_groups_that_fit_are_not_split():
    assert fill_batches(torch.tensor([5, 4, 3, 4]), 8) == [0] * 5 + [2] * 3 + [1] * 4 + [3] * 4
    assert fill_batches(torch.tensor([6, 10]), 8) == [0] * 6 + [1] * 2 + [1] * 8
