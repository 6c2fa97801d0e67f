"""The batch sizes of a training, by TRL's rules."""

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
            The number of processes, of completions per micro-batch in each of them, of micro-batches per update, and
            of micro-batches per generation batch.
        num_generations (`int`), num_iterations (`int`):
            The number of completions per group, and of iterations over each generation batch.
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
        Return the batches of a configuration's values, or raise a `ValueError` if the numbers do not fit together.

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
                f"generation_batch_size: {generation} is not a multiple of {micro}, which is "
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
            raise ValueError(f"num_generations: {size} is too small a group to compare completions. Set at least 2.")
        if self.generation % size:
            raise ValueError(
                f"num_generations: the {self.generation} completions of a generation, which are "
                f"per_device_train_batch_size={self.per_device} x steps_per_generation={self.steps_per_generation} x "
                f"{self.processes} processes, are not whole groups of {size}. Change one of these numbers."
            )
        if whole_groups and self.generation // self.processes % size:
            raise ValueError(
                f"num_generations: the {self.generation // self.processes} completions of a process are not whole "
                f"groups of {size}, which this method needs. Change per_device_train_batch_size or "
                "steps_per_generation."
            )

    @property
    def generation(self) -> int:
        """Return the number of completions that all processes generate at once."""
        return self.per_device * self.steps_per_generation * self.processes

    @property
    def completions_per_update(self) -> int:
        return self.per_device * self.accumulation * self.processes

    @property
    def prompts(self) -> int:
        """Return the number of prompts per generation batch."""
        return self.generation // self.num_generations

    def updates(self, rows: int, max_steps: int, epochs: float) -> int:
        """Return the number of updates on `rows` rows, or raise a `ValueError` if one generation needs more rows."""
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

    @property
    def updates_per_generation(self) -> Fraction:
        return Fraction(self.steps_per_generation * self.num_iterations, self.accumulation)

    def __str__(self) -> str:
        updates = self.updates_per_generation
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return (
            f"{self.generation:,} completions are generated at once (prompts: {self.prompts:,}, of each: "
            f"{self.num_generations}) by {count}, and learned from in {updates} update{'s' * (updates != 1)}, in "
            f"micro-batches of {self.per_device}"
        )
