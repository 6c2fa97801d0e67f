"""
Problems and traces of the larger testbed: the families of the package's testbed, with longer chains.

Problems are drawn as `reasoning-gym` draws its `chain_sum`, without that package: a bare machine does not have it, and
some of what it needs is published without wheels.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from datasets import Dataset
from testbed_model.pretrain import Corpus
from testbed_model.traces import written_sum

from step_trl import testbed
from step_trl.testbed.problems import EVALUATION_SPLITS, as_dataset, never_negative, read_problems


@dataclass(frozen=True)
class Chains:
    """Sums and differences: the fewest and most terms, and the fewest and most digits of a problem's numbers."""

    terms: tuple[int, int]
    digits: tuple[int, int] = (1, 2)

    def draw(self, seed: int, exclude: Collection[str] = ()) -> Iterator[dict[str, str]]:
        """Yield problems as [`~step_trl.testbed.problems.generate`] does, except that they may repeat."""
        rng = random.Random(seed)
        while True:
            digits = rng.randint(*self.digits)
            lowest, highest = 0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1
            count = rng.randint(*self.terms)
            first, *others = (rng.randint(lowest, highest) for _ in range(count))
            terms = [first, *(rng.choice((1, -1)) * term for term in others)]
            expression = written_sum(terms)
            if never_negative(terms) and expression not in exclude:
                question = f"State the final answer to the following arithmetic problem: {expression} ="
                yield {"question": question, "solution": str(sum(terms)), "expression": expression}

    def distinct(self, count: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
        """Return problems that differ from each other."""
        found: dict[str, dict[str, str]] = {}
        for row in self.draw(seed, exclude):
            found[row["expression"]] = row
            if len(found) == count:
                break
        return list(found.values())


TRAIN = Chains((3, 10))
LONGER = {"long": Chains((7, 8), (2, 2)), "longest": Chains((9, 10), (2, 2))}
OF_PACKAGE = ("hard", "unseen")  # evaluation sets of the package: shorter chains, and the family with other wording
EVALUATED = 256  # problems of a new evaluation set, as many as the package's have


def longer_problems() -> dict[str, list[dict[str, str]]]:
    """Return the problems of the new evaluation sets."""
    return {name: chains.distinct(EVALUATED, seed) for seed, (name, chains) in enumerate(LONGER.items())}


def evaluated_expressions() -> set[str]:
    """Return the expressions that no model may be trained on."""
    rows = [row for split in EVALUATION_SPLITS for row in read_problems(split)]
    return {row["expression"] for row in rows + [row for found in longer_problems().values() for row in found]}


def evaluation_sets(count: int) -> dict[str, Dataset]:
    """Return the first problems of each evaluation set."""
    sets = {name: testbed.load_dataset(name) for name in OF_PACKAGE}
    sets |= {name: as_dataset(rows) for name, rows in longer_problems().items()}
    return {name: rows.select(range(min(count, len(rows)))) for name, rows in sets.items()}


def training_set(count: int) -> Dataset:
    """Return the problems of the reinforcement learning."""
    return as_dataset(TRAIN.distinct(count, 1_000_000, evaluated_expressions()))


class LongerCorpus(Corpus):
    """Training examples with longer chains, without any evaluation problem."""

    drill_totals = (120, 450, 900)

    def sources(self, seed: int) -> tuple[Iterator[dict], Iterator[dict]]:
        taken = evaluated_expressions()
        return TRAIN.draw(10_000_000 + seed, taken), Chains((2, 14), (1, 1)).draw(20_000_000 + seed, taken)
