"""Problems in natural language, from the generators of `reasoning-gym`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import reasoning_gym
from datasets import Dataset

from step_trl.testbed.problems import as_dataset, never_negative, parse_expression


@dataclass(frozen=True)
class Family:
    """
    Problems of one kind.

    Attributes:
        generator (`str`), options (`dict[str, Any]`):
            The generator of `reasoning-gym`, and its options.
        seed (`int`):
            The seed of the generator.
    """

    generator: str
    seed: int
    options: dict[str, Any]

    def draw(self, exclude: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield distinct problems endlessly: `question`, `solution` and the generator's `metadata`."""
        seen = set(exclude)
        entries = reasoning_gym.create_dataset(self.generator, seed=self.seed, size=10**9, **self.options)
        for index in range(10**9):
            entry = entries[index]
            question, metadata = entry["question"].strip(), entry["metadata"]
            if question not in seen and _is_of_use(metadata):
                seen.add(question)
                yield {"question": question, "solution": entry["answer"], "metadata": metadata}


def _is_of_use(metadata: dict[str, Any]) -> bool:
    """Leave out running totals below 0, as the testbed does, and numbers that have only 1 in common: most have."""
    if metadata["source_dataset"] == "chain_sum":
        return never_negative(parse_expression(metadata["expression"]))
    return metadata["source_dataset"] != "gcd" or metadata["result"] > 1


def _legs(seed: int, fewest: int, most: int) -> Family:
    return Family("leg_counting", seed, {"min_animals": fewest, "max_animals": most, "max_instances": 9})


def _sums(seed: int, fewest: int, most: int) -> Family:
    options = {"min_terms": fewest, "max_terms": most, "min_digits": 1, "max_digits": 2}
    return Family("chain_sum", seed, options)


def _gcd(seed: int, largest: int) -> Family:
    return Family("gcd", seed, {"min_value": 2, "max_value": largest})


TRAIN = {"legs": _legs(1_000_000, 2, 3), "sums": _sums(2_000_000, 2, 4), "gcd": _gcd(3_000_000, 60)}
# The last two are harder than what the model is trained on.
EVALUATION = {
    "legs": _legs(4_000_000, 2, 3),
    "sums": _sums(5_000_000, 2, 4),
    "gcd": _gcd(6_000_000, 60),
    "more legs": _legs(7_000_000, 4, 4),
    "longer sums": _sums(8_000_000, 5, 6),
}


EXCLUDED = 256  # problems of each evaluation set, the most that can be evaluated


def evaluation_rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first problems of each evaluation set."""
    return {name: list(islice(family.draw(), count)) for name, family in EVALUATION.items()}


@cache
def evaluation_sets(count: int) -> dict[str, Dataset]:
    """Return the first problems of each evaluation set as rows with `prompt` and `solution`."""
    return {name: as_dataset(rows) for name, rows in evaluation_rows(count).items()}


def training_rows(count: int) -> list[dict[str, Any]]:
    """Return problems of all families in turn, without those of the evaluation sets."""
    taken = {row["question"] for rows in evaluation_rows(EXCLUDED).values() for row in rows}
    sources = [family.draw(taken) for family in TRAIN.values()]
    return [next(sources[number % len(sources)]) for number in range(count)]
