"""The chain of SPO: values at some tokens of each completion, estimated by completions that are sampled from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from ..advantages import moments, segment_advantages, segment_boundaries, thin_boundaries
from ..rollout import Rollout
from ..runtime.ranks import rollout_seeds
from .base import EfficientReasoningTrainer
from .batch import Batch
from .spo_config import SPOConfig


Place = tuple[int, int]  # a completion of this process, and the index of the last token that is kept of it
PROMPT = -1  # the boundary at the end of the prompt


class SegmentChain:
    """Samples single completions, and credits their segments (SPO-chain)."""

    def __init__(self, args: SPOConfig):
        self.args = args
        self._sampled_tokens = 0  # for the values of the current batch

    def sample(self, trainer: EfficientReasoningTrainer, batch: Batch) -> list[Rollout]:
        """Sample a completion of each prompt."""
        return trainer.run_rollouts(batch.prompt_ids, seeds=trainer.seeds(len(batch.prompt_ids)))

    def advantages(self, trainer: EfficientReasoningTrainer, batch: Batch) -> list[torch.Tensor]:
        """
        Return the advantages `(T,)` of each completion of this process, before whitening. Every process must call it.

        The trainer's policy samples, and its reward functions score.
        """
        args, completions = self.args, batch.completion_ids
        boundaries = [
            thin_boundaries(
                segment_boundaries(logps[: len(ids)].exp(), args.cut_threshold, args.cut_interval), args.max_segments
            )
            for logps, ids in zip(trainer.old_logps(batch), completions, strict=True)
        ]
        values = self._prompt_values(trainer, batch)
        places = [(index, cut) for index, cuts in enumerate(boundaries) for cut in cuts if (index, cut) not in values]
        # From the longest path to the shortest: those that are sampled together are alike in length, and an engine has
        # the shorter paths in its prefix cache.
        places.sort(key=lambda place: len(batch.prompt_ids[place[0]]) + place[1], reverse=True)
        found = self._values(trainer, batch, places, [args.value_samples] * len(places))
        values |= zip(places, found.tolist(), strict=True)
        scores, eos = batch.local(batch.scores).tolist(), trainer.eos_token_ids
        rewards = [score if ids[-1] in eos else 0.0 for score, ids in zip(scores, completions, strict=True)]
        self._log(trainer, batch, boundaries, list(values.values()))
        return [
            segment_advantages(
                len(ids), cuts, [values[index, cut] for cut in cuts], rewards[index], values.get((index, PROMPT))
            )
            for index, (ids, cuts) in enumerate(zip(completions, boundaries, strict=True))
        ]

    def state_dict(self) -> None:
        """Return `None`: nothing is kept between two generations."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def _prompt_values(self, trainer: EfficientReasoningTrainer, batch: Batch) -> dict[Place, float]:
        """Return the value of the prompt of each completion of this process, if it is to be known."""
        samples, size, number = self.args.value_samples, batch.num_generations, len(batch.completion_ids)
        if self.args.prompt_value == "none":
            return {}
        if self.args.prompt_value == "group_mean":
            of_groups = batch.scores.view(-1, size).mean(dim=1)
        else:  # the completions of a group share the work, on whatever processes they are
            first = batch.accelerator.process_index * number
            shares = [samples // size + (place % size < samples % size) for place in range(first, first + number)]
            means = self._values(trainer, batch, [(index, PROMPT) for index in range(number)], shares)
            totals = batch.gather(means.nan_to_num() * torch.tensor(shares).to(means))
            of_groups = totals.view(-1, size).sum(dim=1) / samples
        values = batch.local(of_groups.repeat_interleave(size)).tolist()
        return {(index, PROMPT): value for index, value in enumerate(values)}

    def _values(
        self, trainer: EfficientReasoningTrainer, batch: Batch, places: Sequence[Place], samples: Sequence[int]
    ) -> torch.Tensor:
        """
        Return the mean reward of completions that begin as those of the batch, NaN for a place without samples.

        Every process must call this.
        """
        origins = torch.tensor([origin for origin, number in enumerate(samples) for _ in range(number)]).long()
        starts = [places[origin] for origin in origins]
        prompts = [batch.prompt_ids[index] for index, _ in starts]
        paths = [batch.completion_ids[index][: cut + 1] for index, cut in starts]
        rollouts = trainer.run_rollouts(
            [[*prompt, *path] for prompt, path in zip(prompts, paths, strict=True)],
            seeds=_value_seeds(trainer.seeds(len(batch.completion_ids)), places, samples),
            budgets=[cast("int", trainer.max_completion_length) - len(path) for path in paths],
        )
        self._sampled_tokens += sum(len(rollout.completion_ids) for rollout in rollouts)
        completions = [path + rollout.completion_ids for path, rollout in zip(paths, rollouts, strict=True)]
        rewards = trainer.weighted_sum(trainer.score(completions, [batch.rows[index] for index, _ in starts], prompts))
        ended = torch.tensor([rollout.ended for rollout in rollouts], device=rewards.device).bool()
        totals = rewards.new_zeros(len(places)).index_add(
            0, origins.to(rewards.device), torch.where(ended, rewards, 0)
        )
        return totals / torch.tensor(samples).to(totals)

    def _log(
        self, trainer: EfficientReasoningTrainer, batch: Batch, boundaries: list[list[int]], values: list[float]
    ) -> None:
        """Log the segments, the spread of the values, and the tokens that were sampled to estimate them."""
        known = torch.tensor(values, device=batch.accelerator.device)
        counts = [
            len(boundaries),
            sum(map(len, boundaries)),
            sum(map(len, batch.completion_ids)),
            self._sampled_tokens,
        ]
        self._sampled_tokens = 0
        local = torch.cat([known.new_tensor(counts).double(), moments(known, torch.ones_like(known))])
        completions, cuts, tokens, sampled, number, total, squares = batch.accelerator.reduce(local, "sum").tolist()
        trainer.log_metric("spo/segments", cuts / completions)
        trainer.log_metric("spo/cost", sampled / tokens)
        if number:
            trainer.log_metric("spo/value_std", math.sqrt(max(squares / number - (total / number) ** 2, 0.0)))


def _value_seeds(seeds: Sequence[int] | None, places: Sequence[Place], samples: Sequence[int]) -> list[int] | None:
    """Return seeds that do not depend on how the completions are split over processes."""
    if seeds is None:
        return None
    return [
        seed
        for (index, cut), number in zip(places, samples, strict=True)
        for seed in rollout_seeds([seeds[index], cut + 1], 0, number)
    ]
