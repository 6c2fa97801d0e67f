"""The E-step of GVM: which prompts are sampled next, and how often."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from ..rollout.allocation import fill_batches, filter_ratios, gvm_weights, preserve_sum
from ..runtime.gradient_norms import embedding_gradients, gradient_norm
from ..runtime.ranks import failing_together, rollout_seeds
from .base import EfficientReasoningTrainer
from .gvm_config import GVMConfig


logger = get_logger(__name__)


class Estimate(NamedTuple):
    """What the completions of one prompt tell: its share of accepted ones, their gradient norm, and their tokens."""

    rate: float
    norm: float
    tokens: int


class Budget:
    """
    Chooses the prompts of generation batches, each as often as its budget allows.

    Prompts come in the order of random permutations of the data set, as many as GRPO would sample. Each estimate is
    for `generations_per_estimate` batches; when they are used up, the current policy makes the next. A prompt that
    comes twice in it has two groups.

    Args:
        args ([`GVMConfig`]):
            The configuration.
        dataset ([`~datasets.Dataset`]):
            The training data.
        completions (`int`):
            The number of completions of a generation batch over all processes.
    """

    def __init__(self, args: GVMConfig, dataset: Dataset, completions: int):
        self.args = args
        self.dataset = dataset
        self.completions = completions
        self._total = completions * args.generations_per_estimate
        self._prompts = self._total // (args.num_generations or 1)
        self._seen = 0  # prompts that budgets were made for
        self._queue: list[tuple[int, int]] = []  # of completions still to be sampled: row, and group
        self._synchronised = False

    def next_rows(self, trainer: EfficientReasoningTrainer) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the row and the group of each of this process's next completions. Every process must call this."""
        if not self._synchronised:  # after a resume with more processes, some had no state
            state = [self.state_dict()]
            broadcast_object_list(state)
            self.load_state_dict(state[0])
            self._synchronised = True
        if len(self._queue) < self.completions:
            self._make(trainer)
        taken, self._queue = self._queue[: self.completions], self._queue[self.completions :]
        own = self.completions // trainer.accelerator.num_processes
        first = own * trainer.accelerator.process_index
        rows, groups = zip(*taken[first : first + own], strict=True)
        return [self.dataset[row] for row in rows], list(groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of prompts seen, and the completions that are still to be sampled."""
        return {"seen": self._seen, "queue": self._queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume with what [`state_dict`] has returned."""
        self._seen, self._queue = state["seen"], state["queue"]

    def _make(self, trainer: EfficientReasoningTrainer) -> None:
        """Estimate the next prompts, and divide the budget among them."""
        started, args = time.perf_counter(), self.args
        first, self._seen = self._seen, self._seen + self._prompts
        rows = shuffled_indices(first, self._prompts, len(self.dataset), args.seed if args.shuffle_dataset else None)
        estimates = self._estimate(trainer, rows)
        rates, norms = (torch.tensor([one[part] for one in estimates], dtype=torch.float64) for part in (0, 1))
        weights = gvm_weights(norms, rates, args.budget_alpha, args.budget_beta)
        ratios = weights / weights.sum() if weights.any() else weights
        ratios = filter_ratios(ratios, rates, self._total, args.filter_threshold, args.filter_insufficient)
        if not ratios.any():
            logger.warning("No prompt of %d has a budget, so each gets num_generations completions.", self._prompts)
            ratios = torch.full_like(ratios, 1 / self._prompts)
        numbers = preserve_sum(ratios, self._total, args.rounding, rates)
        self._queue = [(rows[place], first + place) for place in fill_batches(numbers, self.completions)]
        solved = rates > 0
        for name, value in {
            "mean": numbers.double().mean(),
            "max": numbers.max(),
            "zero_frac": (numbers == 0).double().mean(),
            "accept_rate": rates.mean(),
            "grad_norm": norms[solved].mean() if solved.any() else 0.0,
            "estimate_tokens": sum(one.tokens for one in estimates),
            "estimate_seconds": time.perf_counter() - started,
        }.items():
            trainer.log_metric(f"budget/{name}", float(value))

    def _estimate(self, trainer: EfficientReasoningTrainer, rows: Sequence[int]) -> list[Estimate]:
        """Sample each prompt `estimate_samples` times, and return the estimates. The processes share the prompts."""
        number = self.args.estimate_samples
        places = range(trainer.accelerator.process_index, len(rows), trainer.accelerator.num_processes)
        of_places = [self.dataset[rows[place]] for place in places]
        own = [row for row in of_places for _ in range(number)]
        tokenized = trainer.tokenize_prompts([row["prompt"] for row in of_places])
        prompts = [ids for ids in tokenized for _ in range(number)]
        key = gather_object([trainer.seeds(1)])[0]
        all_seeds = key and rollout_seeds(key, 0, len(rows) * number)
        seeds = all_seeds and [seed for place in places for seed in all_seeds[place * number : (place + 1) * number]]
        rollouts = trainer.run_rollouts(prompts, seeds=seeds)
        accepted = trainer.are_correct(trainer.score([one.completion_ids for one in rollouts], own, prompts)).tolist()
        with failing_together():
            norms = self._norms(trainer, prompts, [one.completion_ids for one in rollouts], accepted)
        found = {}
        for index, place in enumerate(places):
            of_prompt = slice(index * number, (index + 1) * number)
            count = sum(accepted[of_prompt])
            tokens = sum(one.sampled_tokens for one in rollouts[of_prompt])
            found[place] = Estimate(count / number, sum(norms[of_prompt]) / max(1, count), tokens)
        estimates = {place: one for part in gather_object([found]) for place, one in part.items()}
        return [estimates[place] for place in range(len(rows))]

    def _norms(
        self,
        trainer: EfficientReasoningTrainer,
        prompts: list[list[int]],
        completions: list[list[int]],
        accepted: list[bool],
    ) -> list[float]:
        """Return the gradient norm of each accepted completion, and 0 for the others."""
        if self.args.ratio_by == "accept_rate":
            return [float(one) for one in accepted]
        with embedding_gradients(trainer.accelerator.unwrap_model(trainer.model)) as weight:
            return [
                gradient_norm(trainer.logps_of(prompt, completion), weight) if right else 0.0
                for prompt, completion, right in zip(prompts, completions, accepted, strict=True)
            ]


def shuffled_indices(first: int, number: int, size: int, seed: int | None) -> list[int]:
    """
    Return indices of a data set of `size` rows, from position `first` of an endless sequence of permutations of it.

    Without a seed, the rows keep their order.
    """
    indices: list[int] = []
    for epoch in range(first // size, (first + number - 1) // size + 1):
        if seed is None:
            indices += range(size)
        else:
            generator = torch.Generator().manual_seed(rollout_seeds([seed, epoch], 0, 1)[0])
            indices += torch.randperm(size, generator=generator).tolist()
    return indices[first % size :][:number]
