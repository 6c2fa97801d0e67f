"""A store of edges that were sampled but not trained on (SPO-tree, arXiv 2505.23564)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Edge:
    """
    A segment of a tree as a training sample.

    Attributes:
        prompt_ids (`list[int]`):
            The prompt, and the path from there to the segment.
        token_ids (`list[int]`), logprobs (`list[float]`):
            The segment, with the log-probabilities with which it was sampled.
        ended (`bool`):
            Whether it ends in EOS.
        advantage (`float`):
            The edge's advantage.
        rewards (`list[float]`):
            The value of the segment's end under each reward function.
        row (`dict[str, Any]`):
            The row of the data set.
        iteration (`int`):
            The generation in which it was sampled.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    ended: bool
    advantage: float
    rewards: list[float]
    row: dict[str, Any]
    iteration: int


class EdgeReplay:
    """
    Hands out edges, some of each question per iteration, and keeps the others for later iterations.

    Args:
        per_question (`int`, *optional*, defaults to `32`):
            The maximum number of edges of a question in one iteration.
        max_age (`int`, *optional*, defaults to `8`):
            Edges that are this many iterations old are dropped.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the choice.
    """

    def __init__(self, per_question: int = 32, max_age: int = 8, seed: int = 0):
        self.per_question = per_question
        self.max_age = max_age
        self.seed = seed
        self._edges: dict[Hashable, list[Edge]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._edges.values()))

    def add(self, question: Hashable, edges: Sequence[Edge]) -> None:
        """Add edges of a question."""
        self._edges.setdefault(question, []).extend(edges)

    def draw(self, iteration: int, number: int) -> list[Edge]:
        """
        Remove and return at most `number` edges, random ones of each question, those of the latest questions first.

        Args:
            iteration (`int`):
                The current iteration. Edges that are too old for it are dropped.
            number (`int`):
                The number of edges wanted.
        """
        for question, edges in list(self._edges.items()):
            self._edges[question] = [edge for edge in edges if iteration - edge.iteration < self.max_age]
            if not self._edges[question]:
                del self._edges[question]
        chooser = random.Random(f"{self.seed}, {iteration}")
        drawn: list[Edge] = []
        latest_first = sorted(self._edges, key=lambda question: -max(edge.iteration for edge in self._edges[question]))
        for question in latest_first:
            edges = self._edges[question]
            chooser.shuffle(edges)
            wanted = min(self.per_question, number - len(drawn))
            drawn += edges[:wanted]
            self._edges[question] = edges[wanted:]
        return drawn

    def state_dict(self) -> dict[Hashable, list[dict[str, Any]]]:
        """Return what [`load_state_dict`] needs."""
        return {question: [vars(edge) for edge in edges] for question, edges in self._edges.items()}

    def load_state_dict(self, state: dict[Hashable, list[dict[str, Any]]]) -> None:
        """Resume with the edges of a checkpoint."""
        self._edges = {question: [Edge(**edge) for edge in edges] for question, edges in state.items()}
