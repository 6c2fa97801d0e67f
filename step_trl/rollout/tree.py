"""Trees of segments (SPO-tree, arXiv 2505.23564): completions of a prompt that share their beginnings."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from .engines import Engine, Generation
from .event_loop import gather, rare_garbage_collections, run_to_end
from .records import SamplingParams


@dataclass
class Segment:
    """
    A node of a tree: the tokens between its parent's end and its own.

    Attributes:
        parent (`int`):
            The index of the parent in the tree, -1 for the children of the prompt.
        token_ids (`list[int]`), logprobs (`list[float]`):
            The sampled tokens, and their log-probabilities under the distribution from which they were sampled.
        start (`int`):
            The number of tokens between the prompt and the segment.
        ended (`bool`):
            Whether the segment ends in EOS. A leaf that has not ended was cut by the budget.
        is_leaf (`bool`):
            Whether the segment has no children.
    """

    parent: int
    token_ids: list[int]
    logprobs: list[float]
    start: int
    ended: bool
    is_leaf: bool


def path_to(tree: Sequence[Segment], node: int) -> list[int]:
    """Return the token ids from the prompt to the end of a node, which are empty for the prompt itself (-1)."""
    parts = []
    while node >= 0:
        parts.append(tree[node].token_ids)
        node = tree[node].parent
    return [token_id for part in reversed(parts) for token_id in part]


class TreeRollout:
    """
    Samples a tree of segments for each prompt. A segment that several leaves share is sampled once.

    Args:
        engine ([`Engine`]):
            The source of tokens.
        sampling ([`SamplingParams`]):
            The budget of a whole completion, and the sampling of the policy.
        branching (`Sequence[int]`, *optional*, defaults to `(6, 6, 6)`):
            The number of children of a node on each level.
        segment_tokens (`int`, *optional*, defaults to `600`):
            The maximum length of a segment. Those of the last level continue to the end of the completion.
        max_in_flight (`int`, *optional*):
            The maximum number of segments that are sampled at once, by default no limit.

    Attributes:
        sampled_tokens (`int`):
            The number of tokens that engine calls have returned so far.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        branching: Sequence[int] = (6, 6, 6),
        segment_tokens: int = 600,
        max_in_flight: int | None = None,
    ):
        self.engine = engine
        self.sampling = sampling
        self.branching = tuple(branching)
        self.segment_tokens = segment_tokens
        self.max_in_flight = max_in_flight
        self.sampled_tokens = 0

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> list[list[Segment]]:
        """
        Sample a tree for each prompt, concurrently.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                The token ids of the prompts.
            seeds (`Sequence[int]`, *optional*):
                One seed per prompt. A seeded tree does not depend on the others.

        Returns:
            `list[list[Segment]]`: For each prompt, the segments of its tree. Parents come before their children.
        """
        with rare_garbage_collections():
            return run_to_end(self._grow_all(prompts, [None] * len(prompts) if seeds is None else seeds))

    async def _grow_all(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int | None]) -> list[list[Segment]]:
        slots = nullcontext() if self.max_in_flight is None else asyncio.Semaphore(self.max_in_flight)

        async def grow(prompt: Sequence[int], seed: int | None) -> list[Segment]:
            async with self.engine.for_rollout(prompt) as engine:
                return _flat(await _GrowingTree(self, engine, prompt, slots).branch(array("q"), 0, seed))

        return await gather(grow(*row) for row in zip(prompts, seeds, strict=True))


@dataclass
class _Node:
    generation: Generation
    start: int
    children: list[_Node]


class _GrowingTree:
    """Samples the segments of one tree. Siblings do not wait for each other."""

    def __init__(
        self,
        owner: TreeRollout,
        engine: Engine,
        prompt: Sequence[int],
        slots: AbstractAsyncContextManager[None],
    ):
        self.owner = owner
        self.engine = engine
        self.prompt = array("q", prompt)
        self.slots = slots

    async def branch(self, path: array[int], level: int, seed: int | None) -> list[_Node]:
        """Sample the children of a node, and the trees below them."""
        number = self.owner.branching[level]
        # Mixed, so that no two nodes of a tree share a seed.
        seeds = [None if seed is None else (seed * 1_000_003 + 1 + child) % 2**63 for child in range(number)]
        return await gather(self._child(path, level, child_seed) for child_seed in seeds)

    async def _child(self, path: array[int], level: int, seed: int | None) -> _Node:
        owner, sampling = self.owner, self.owner.sampling
        is_last, remaining = level + 1 == len(owner.branching), sampling.max_tokens - len(path)
        async with self.slots:
            segment = await self.engine.generate(
                self.prompt + path,
                max_tokens=remaining if is_last else min(owner.segment_tokens, remaining),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=seed,
            )
        owner.sampled_tokens += len(segment.token_ids)
        node = _Node(segment, len(path), [])
        if not is_last and segment.finish_reason != "eos" and len(segment.token_ids) < remaining:
            node.children = await self.branch(path + array("q", segment.token_ids), level + 1, seed)
        return node


def _flat(nodes: Sequence[_Node]) -> list[Segment]:
    """List the segments below a prompt, in depth-first order."""
    tree: list[Segment] = []

    def add(node: _Node, parent: int) -> None:
        generation = node.generation
        ended = generation.finish_reason == "eos"
        tree.append(Segment(parent, generation.token_ids, generation.logprobs, node.start, ended, not node.children))
        own = len(tree) - 1
        for child in node.children:
            add(child, own)

    for node in nodes:
        add(node, -1)
    return tree
