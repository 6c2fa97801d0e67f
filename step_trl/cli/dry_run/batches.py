"""Sizes of a training's batches, by TRL's rules."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from fractions import Fraction

from trl.trainer.utils import RepeatSampler


@dataclass(frozen=True)
class Batches:
    """
    How many completions are generated at once, and how they are used.

    Attributes:
        processes (`int`), per_device (`int`), accumulation (`int`), steps_per_generation (`int`):
            Processes; completions of a micro-batch in each of them; micro-batches of an update and of a generation.
        num_generations (`int`), num_iterations (`int`):
            Completions of a group, and how often each is learned from.
    """

    processes: int
    per_device: int
    accumulation: int
    steps_per_generation: int
    num_generations: int
    num_iterations: int

    @classmethod
    def of(cls, values: Namespace, processes: int, whole_groups: bool = False) -> Batches:
        """
        Return the batches of a configuration's values. Raises `ValueError` for numbers that do not fit one another.

        With `whole_groups`, each process must have whole groups.
        """
        micro = values.per_device_train_batch_size * processes
        generation, steps = values.generation_batch_size, values.steps_per_generation
        if generation is not None and steps is not None:
            raise ValueError(
                f"generation_batch_size: {generation}, and steps_per_generation={steps}. Set only one of the two."
            )
        if generation is not None and generation % micro:
            raise ValueError(
                f"generation_batch_size: {generation} is no multiple of {micro}, which is "
                f"per_device_train_batch_size={values.per_device_train_batch_size} x {processes} processes."
            )
        if steps is None:
            steps = values.gradient_accumulation_steps if generation is None else generation // micro
        batches = cls(
            processes,
            values.per_device_train_batch_size,
            values.gradient_accumulation_steps,
            steps,
            values.num_generations,
            values.num_iterations,
        )
        batches._check_groups(whole_groups)
        return batches

    def _check_groups(self, whole_groups: bool) -> None:
        size = self.num_generations
        if size < 2:
            raise ValueError(f"num_generations: {size} is no group to compare a completion with. Set at least 2.")
        if self.generation % size:
            raise ValueError(
                f"num_generations: the {self.generation} completions of a generation, which are "
                f"per_device_train_batch_size={self.per_device} x steps_per_generation={self.steps_per_generation} x "
                f"{self.processes} processes, are no whole groups of {size}. Set one of them so that they are."
            )
        if whole_groups and self.generation // self.processes % size:
            raise ValueError(
                f"num_generations: the {self.generation // self.processes} completions of a process are no whole "
                f"groups of {size}, which this method samples there. Set per_device_train_batch_size or "
                "steps_per_generation so that they are."
            )

    @property
    def generation(self) -> int:
        """Completions that are generated at once, by all processes."""
        return self.per_device * self.steps_per_generation * self.processes

    @property
    def completions_per_update(self) -> int:
        return self.per_device * self.accumulation * self.processes

    @property
    def prompts(self) -> int:
        """Of a generation."""
        return self.generation // self.num_generations

    def updates(self, rows: int, max_steps: int, epochs: float) -> int:
        """Of a training on `rows` rows. Raises `ValueError` if they are fewer than the prompts of a generation."""
        if rows < self.prompts:
            raise ValueError(
                f"dataset: its {rows} rows are fewer than the {self.prompts} prompts of a generation. Set smaller "
                "batches, or give more rows."
            )
        if max_steps > 0:
            return max_steps
        repeats = self.num_iterations * self.steps_per_generation
        sampler = RepeatSampler(range(rows), self.num_generations, self.prompts, repeats)
        micro_batches = len(sampler) // self.generation
        return math.ceil(epochs * max(1, math.ceil(micro_batches / self.accumulation)))

    def __str__(self) -> str:
        updates = Fraction(self.steps_per_generation * self.num_iterations, self.accumulation)
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return (
            f"{self.generation:,} completions are generated at once (prompts: {self.prompts:,}, of each: "
            f"{self.num_generations}) by {count}, and learned from in {updates} update{'s' * (updates != 1)}, in "
            f"micro-batches of {self.per_device}"
        )
