"""The tree of SPO: completions that share their beginnings, whose segments are the samples to train on."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..advantages import edge_advantages, tree_values
from ..rollout import Rollout, Segment, TreeRollout, path_to
from ..rollout.replay import Edge, EdgeReplay
from .base import EfficientReasoningTrainer
from .batch import Batch
from .spo_config import SPOConfig


class SegmentTree:
    """
    Samples trees, and hands out their edges as completions (SPO-tree).

    A group is one tree of its prompt, and stands for as many edges as it has completions. An edge's prompt ends with
    the path to it. Edges that were not handed out may be, in later generations.
    """

    def __init__(self, args: SPOConfig):
        self.args = args
        self._replay = EdgeReplay(args.edges_per_question, args.max_edge_age, args.seed)
        self._edges: list[Edge] = []  # the completions of the current batch
        self._iteration = 0

    def sample(self, trainer: EfficientReasoningTrainer, batch: Batch) -> list[Rollout]:
        """Sample a tree for each group, and choose edges. Their rows and rewards replace those of the batch."""
        self._iteration += 1
        size, number = batch.num_generations, len(batch.prompt_ids)
        prompts, rows, seeds = batch.prompt_ids[::size], batch.rows[::size], trainer.seeds(number)
        trees = self._grow(trainer, prompts, None if seeds is None else seeds[::size])
        edges = self._edges_of(trainer, trees, prompts, rows)
        for prompt, own in zip(prompts, edges, strict=True):
            self._replay.add(tuple(prompt), [edge for edge in own if edge.advantage and edge.token_ids])
        drawn = self._replay.draw(self._iteration, number)
        fillers = [replace(edge, advantage=0.0) for own in edges for edge in own if edge.token_ids]
        self._edges = [*drawn, *itertools.islice(itertools.cycle(fillers), number - len(drawn))]
        batch.rows = [edge.row for edge in self._edges]
        batch.rewards = [edge.rewards for edge in self._edges]
        return [
            Rollout(
                edge.prompt_ids,
                edge.token_ids,
                # Not those of another policy, with which the servers' log-probabilities would be compared.
                array("d", edge.logprobs if edge.iteration == self._iteration else [math.nan] * len(edge.logprobs)),
                [False] * len(edge.token_ids),
                ended=edge.ended,
                sampled_tokens=len(edge.token_ids),
            )
            for edge in self._edges
        ]

    def advantages(self, trainer: EfficientReasoningTrainer, batch: Batch) -> list[torch.Tensor]:
        """
        Return the advantages `(T,)` of each edge of this process, before whitening.

        Edges of earlier generations keep the log-probabilities with which they were sampled. Edges that do not teach
        anything leave the loss.
        """
        old_logps = trainer.old_logps(batch).clone()
        for place, edge in enumerate(self._edges):
            if edge.iteration < self._iteration:
                old_logps[place, : len(edge.logprobs)] = torch.tensor(edge.logprobs).to(old_logps)
        batch.old_logps = batch.inputs["old_per_token_logps"] = old_logps
        silent = torch.tensor([edge.advantage == 0 for edge in self._edges], device=old_logps.device)
        batch.exclude(silent[:, None].expand_as(old_logps))
        return [torch.full((len(edge.token_ids),), edge.advantage) for edge in self._edges]

    def state_dict(self) -> dict[str, Any]:
        """Return the edges that were not handed out, and the number of generations so far."""
        return {"iteration": self._iteration, "edges": self._replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume with what [`state_dict`] has returned."""
        self._iteration = state["iteration"]
        self._replay.load_state_dict(state["edges"])

    def _grow(
        self, trainer: EfficientReasoningTrainer, prompts: list[list[int]], seeds: list[int] | None
    ) -> list[list[Segment]]:
        args = self.args
        with trainer.policy_engine() as engine:
            rollout = TreeRollout(
                engine, trainer.sampling_params, args.branching, args.segment_tokens, args.max_rollouts_in_flight
            )
            with trainer.status.following(rollout, len(prompts)):
                return rollout.run(prompts, seeds)

    def _edges_of(
        self,
        trainer: EfficientReasoningTrainer,
        trees: list[list[Segment]],
        prompts: list[list[int]],
        rows: Sequence[dict[str, Any]],
    ) -> list[list[Edge]]:
        """Score the leaves, and return the edges of each tree. Every process must call this."""
        leaves = [[node for node, segment in enumerate(tree) if segment.is_leaf] for tree in trees]
        places = [(index, node) for index, nodes in enumerate(leaves) for node in nodes]
        rewards = trainer.score(
            [path_to(trees[index], node) for index, node in places],
            [rows[index] for index, _ in places],
            [prompts[index] for index, _ in places],
        )
        ended = torch.tensor([trees[index][node].ended for index, node in places], device=rewards.device)
        rewards = torch.where(ended[:, None] | rewards.isnan(), rewards, 0)
        self._log(trainer, trees, trainer.weighted_sum(rewards))
        return [
            self._edges_of_one(trainer, tree, nodes, of_leaves, prompt, row)
            for tree, nodes, of_leaves, prompt, row in zip(
                trees, leaves, rewards.split([len(nodes) for nodes in leaves]), prompts, rows, strict=True
            )
        ]

    def _edges_of_one(
        self,
        trainer: EfficientReasoningTrainer,
        tree: list[Segment],
        leaves: list[int],
        rewards: torch.Tensor,
        prompt: list[int],
        row: dict[str, Any],
    ) -> list[Edge]:
        parents = [segment.parent for segment in tree]
        columns = rewards.new_zeros(len(tree), rewards.size(1) + 1)
        columns[leaves] = torch.cat([rewards, trainer.weighted_sum(rewards)[:, None]], dim=1)
        *by_function, values = (tree_values(parents, column.tolist()) for column in columns.T)
        advantages = edge_advantages(parents, values, self.args.edge_advantage)
        return [
            Edge(
                prompt_ids=prompt + path_to(tree, segment.parent),
                token_ids=segment.token_ids,
                logprobs=segment.logprobs,
                ended=segment.ended,
                advantage=advantages[node],
                rewards=[column[node] for column in by_function],
                row=row,
                iteration=self._iteration,
            )
            for node, segment in enumerate(tree)
        ]

    def _log(self, trainer: EfficientReasoningTrainer, trees: list[list[Segment]], rewards: torch.Tensor) -> None:
        """Log the leaves, as TRL logs completions: their rewards and lengths, and how many were cut."""
        leaves = [segment for tree in trees for segment in tree if segment.is_leaf]
        lengths = torch.tensor([segment.start + len(segment.token_ids) for segment in leaves]).to(rewards)
        cut = torch.tensor([not segment.ended for segment in leaves]).to(rewards)
        sampled = torch.tensor([sum(len(segment.token_ids) for segment in tree) for tree in trees]).to(rewards)
        values = {"reward": rewards, "length": lengths, "clipped_ratio": cut, "sampled_tokens": sampled}
        trainer.log_masked_means(
            {f"spo/leaves/{name}": (value, torch.ones_like(value, dtype=torch.bool)) for name, value in values.items()}
        )
