"""Values and advantages on SPO's trees against the numbers of the formulas and against plain Python."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_trl.advantages import edge_advantages, tree_values


def test_a_tree_of_two_by_two():
    parents = [-1, -1, 0, 0, 1, 1]
    values = tree_values(parents, [9, 9, 1, 0, 1, 1])
    assert values == [0.5, 1, 1, 0, 1, 1, 0.75]
    assert edge_advantages(parents, values) == [-0.25, 0.25, 0.5, -0.5, 0, 0]
    expected = [-0.99999996, 0.99999996, 0.99999998, -0.99999998, 0, 0]
    assert edge_advantages(parents, values, "grpo") == pytest.approx(expected, abs=1e-9)


def test_a_leaf_that_ends_early():
    parents = [-1, -1, 1, 1, 1]
    values = tree_values(parents, [1, 9, 0, 1, 0])
    assert values[1] == pytest.approx(1 / 3) and values[-1] == pytest.approx(2 / 3)
    assert edge_advantages(parents, values) == pytest.approx([1 / 3, -1 / 3, -1 / 3, 2 / 3, -1 / 3])


@given(st.data())
def test_trees_equal_the_recursive_reference(data):
    size = data.draw(st.integers(1, 12))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    parents[0] = -1
    rewards = data.draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size))

    def value(node):
        children = [child for child, parent in enumerate(parents) if parent == node]
        return statistics.fmean(map(value, children)) if children else rewards[node]

    values = tree_values(parents, rewards)
    assert values == pytest.approx([value(node) for node in [*range(size), -1]])
    advantages = edge_advantages(parents, values)
    assert advantages == pytest.approx([value(node) - value(parents[node]) for node in range(size)], abs=1e-9)
    for parent in {*parents}:  # siblings cancel out
        assert sum(a for a, of in zip(advantages, parents) if of == parent) == pytest.approx(0, abs=1e-9)


def test_a_form_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="form: 'ppo' is not known"):
        edge_advantages([-1], [1.0, 1.0], "ppo")
