"""Groups of different sizes (GVM, arXiv 2505.02391), against plain loops over groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_trl.advantages import prompt_weights, ragged_advantages


rows = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 1), st.booleans(), st.integers(1, 9)), min_size=1, max_size=12
)


def test_a_group_of_the_paper_and_a_group_of_one():
    rewards, groups = torch.tensor([1.0, 0, 0, 0, 1]), torch.tensor([7, 7, 7, 7, 2])
    advantages = ragged_advantages(rewards, groups, torch.ones(5, dtype=torch.bool)).tolist()
    assert advantages[:4] == pytest.approx([1.499997, -0.499999, -0.499999, -0.499999], abs=1e-6)
    assert advantages[4] == pytest.approx(1 / (1 + 1e-6))


@given(rows)
def test_advantages_are_those_of_each_group_alone(rows):
    groups, rewards, counted, _ = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = ragged_advantages(rewards.double(), groups, counted)
    for group in groups.unique():
        members = (groups == group) & counted
        own = rewards[members].double()
        mean, deviation = (own.mean(), own.std()) if len(own) > 1 else (0.0, 1.0)
        torch.testing.assert_close(found[members], (own - mean) / (deviation + 1e-6), rtol=1e-6, atol=1e-6)
    assert not found[~counted].any()


@given(rows, st.integers(0, 2**32 - 1))
def test_a_weighted_mean_over_tokens_is_a_mean_over_prompts(rows, seed):
    groups, _, counted, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    values = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for length in lengths.tolist()]
    weights = prompt_weights(groups, counted, lengths)
    found = sum(weight * of.sum() for weight, of in zip(weights, values, strict=True)) / lengths.sum()

    expected = torch.tensor(0.0)
    for group in groups.unique():
        means = [values[place].mean() for place in range(len(rows)) if groups[place] == group and counted[place]]
        if means:
            expected += torch.stack(means).mean() / len(groups.unique())
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5)
