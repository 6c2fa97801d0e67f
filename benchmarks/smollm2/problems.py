"""Problems in natural language, from the generators of `reasoning-gym`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
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


def _legs(seed: int, most_animals: int, most_instances: int) -> Family:
    options = {"min_animals": 2, "max_animals": most_animals, "max_instances": most_instances}
    return Family("leg_counting", seed, options)


def _sums(seed: int, most_terms: int, most_digits: int) -> Family:
    options = {"min_terms": 2, "max_terms": most_terms, "min_digits": 1, "max_digits": most_digits}
    return Family("chain_sum", seed, options)


def _gcd(seed: int, largest: int) -> Family:
    return Family("gcd", seed, {"min_value": 2, "max_value": largest})


# The model is taught with harder problems than it is trained on, of which it solves few.
TAUGHT = {"legs": _legs(1_000_000, 3, 9), "sums": _sums(2_000_000, 4, 2), "gcd": _gcd(3_000_000, 60)}
HARDER = {
    "harder legs": _legs(4_000_000, 3, 9),
    "harder sums": _sums(5_000_000, 4, 2),
    "harder gcd": _gcd(6_000_000, 60),
}
TRAINED = {"legs": _legs(7_000_000, 2, 5), "sums": _sums(8_000_000, 3, 1), "gcd": _gcd(9_000_000, 40)}
LIKE_TRAINED = {"legs": _legs(10_000_000, 2, 5), "sums": _sums(11_000_000, 3, 1), "gcd": _gcd(12_000_000, 40)}
EVALUATION = (*LIKE_TRAINED, *HARDER)
MOST_EXAMPLES, MOST_HARDER, MOST_LIKE_TRAINED = 1600, 256, 64  # numbers of problems that other sets do not contain


def _first(families: Mapping[str, Family], count: int, exclude: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    return {name: list(islice(family.draw(exclude), count)) for name, family in families.items()}


def _in_turn(families: Mapping[str, Family], count: int, exclude: Collection[str]) -> list[dict[str, Any]]:
    sources = [family.draw(exclude) for family in families.values()]
    return [next(sources[number % len(sources)]) for number in range(count)]


def _questions(sets: Iterable[list[dict[str, Any]]]) -> set[str]:
    return {row["question"] for rows in sets for row in rows}


@cache
def _harder() -> dict[str, list[dict[str, Any]]]:
    return _first(HARDER, MOST_HARDER, ())


@cache
def _taught() -> list[dict[str, Any]]:
    return _in_turn(TAUGHT, MOST_EXAMPLES, _questions(_harder().values()))


def taught_rows(count: int) -> list[dict[str, Any]]:
    """Return problems to teach with."""
    if count > MOST_EXAMPLES:
        raise ValueError(f"examples: {count} are more than there are. Set at most {MOST_EXAMPLES}.")
    return _taught()[:count]


def evaluation_rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first problems of each evaluation set."""
    if count > MOST_LIKE_TRAINED:
        raise ValueError(f"problems: {count} are more than there are. Set at most {MOST_LIKE_TRAINED}.")
    others = _questions([_taught(), *_harder().values()])
    return _first(LIKE_TRAINED, count, others) | {name: rows[:count] for name, rows in _harder().items()}


@cache
def evaluation_sets(count: int) -> dict[str, Dataset]:
    """Return the first problems of each evaluation set as rows with `prompt` and `solution`."""
    return {name: as_dataset(rows) for name, rows in evaluation_rows(count).items()}


def training_rows(count: int) -> list[dict[str, Any]]:
    """Return problems to train on, of all families in turn."""
    return _in_turn(TRAINED, count, _questions([_taught(), *evaluation_rows(MOST_LIKE_TRAINED).values()]))
