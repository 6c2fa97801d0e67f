"""Values and advantages on a tree of segments (SPO-tree, arXiv 2505.23564)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from ..checks import check_choice


EdgeAdvantage = Literal["rloo", "grpo"]


def tree_values(parents: Sequence[int], rewards: Sequence[float]) -> list[float]:
    """
    Return the value of each node of a tree: a leaf's reward, or the mean of its children.

    Args:
        parents (`Sequence[int]` of length N):
            The index of each node's parent, which comes before it. -1 for the children of the root.
        rewards (`Sequence[float]` of length N):
            The reward of each leaf. Those of other nodes are not read.

    Returns:
        `list[float]` of length N + 1: The value of each node, and last that of the root, whose index is so -1.

    Example:
    ```python
    >>> tree_values([-1, -1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1])
    [0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 0.75]
    ```
    """
    children = _children(parents)
    values = [*map(float, rewards), 0.0]
    for node in (*reversed(range(len(parents))), -1):
        if node in children:
            values[node] = statistics.fmean(values[child] for child in children[node])
    return values


def edge_advantages(parents: Sequence[int], values: Sequence[float], form: EdgeAdvantage = "rloo") -> list[float]:
    """
    Return the advantage of the edge to each node: its value minus its parent's.

    Args:
        parents (`Sequence[int]` of length N):
            As in [`tree_values`].
        values (`Sequence[float]` of length N + 1):
            The values, as from [`tree_values`].
        form (`"rloo"` or `"grpo"`, *optional*, defaults to `"rloo"`):
            `"grpo"` divides by the (population) standard deviation of the siblings, plus 1e-8. Despite the paper's
            name for the other form, the parent's value includes the node itself.

    Example:
    ```python
    >>> edge_advantages([-1, -1, 0, 0, 1, 1], [0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 0.75])
    [-0.25, 0.25, 0.5, -0.5, 0.0, 0.0]
    ```
    """
    check_choice("form", form, EdgeAdvantage)
    differences = [values[node] - values[parent] for node, parent in enumerate(parents)]
    if form == "rloo":
        return differences
    spread = {
        parent: statistics.pstdev([values[child] for child in nodes]) + 1e-8
        for parent, nodes in _children(parents).items()
    }
    return [difference / spread[parent] for difference, parent in zip(differences, parents, strict=True)]


def _children(parents: Sequence[int]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(parents):
        children[parent].append(node)
    return children
