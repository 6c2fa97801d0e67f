"""
Thoughts about the problems, written out: a first pass, then re-checks opened by "Wait" or "Alternatively".

They are like those of the testbed (`testbed_model/traces.py`): there are re-checks even if the answer is right, and
slips are pieces that carry no loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS
from testbed_model.traces import OPENINGS, Piece, TraceWriter, cut_at_trigger, with_answer, with_checks

from step_trl.testbed.problems import parse_expression


Pass = Callable[[], tuple[int, list[Piece]]]  # a way to solve a problem: returns the result and how it was found
FIRST_SLIPS, LATER_SLIPS = 0.3, 0.05
SHARE_CUT = 0.25  # of the examples, which teach to answer at any re-check


def example(row: dict[str, Any], rng: random.Random) -> list[Piece]:
    """Return a completion of a problem, or the beginning of one and an answer. Only trained pieces have a loss."""
    written = [Piece("<think>\n"), *thought(row["metadata"], rng)]
    solution = [int(row["solution"])]
    return cut_at_trigger(written, solution, rng) if rng.random() < SHARE_CUT else with_answer(written, solution)


def thought(metadata: dict[str, Any], rng: random.Random) -> list[Piece]:
    """Write a first pass and one to four re-checks."""
    first, checks = WRITERS[metadata["source_dataset"]](metadata, rng)

    def check() -> tuple[str, int, list[Piece]]:
        opening, way = rng.choice(checks)
        return opening, *way()

    return with_checks(first(), check, wanted=rng.choice((1, 2, 2, 3)), most=4)


def _result(rng: random.Random, value: int, slip_rate: float) -> tuple[int, Piece]:
    """Return a result, which is wrong with probability `slip_rate`, as a piece."""
    slipped = rng.random() < slip_rate
    if slipped:
        value = max(1, value + rng.choice((-10, -2, -1, 1, 2, 10)))
    return value, Piece(f" {value}", trained=not slipped)


def sums(metadata: dict[str, Any], rng: random.Random) -> tuple[Pass, list[tuple[str, Pass]]]:
    """Two numbers at a time; then one at a time, in smaller parts, or additions before subtractions."""
    writer, terms = TraceWriter(rng), parse_expression(metadata["expression"])
    ways = {"single": writer.single, "parts": writer.parts}
    if terms != sorted(terms, key=lambda term: term < 0):
        ways["reorder"] = writer.reorder
    return partial(writer.pairs, terms), [
        (opening, partial(way, terms)) for name, way in ways.items() for opening in OPENINGS[name]
    ]


def legs(metadata: dict[str, Any], rng: random.Random) -> tuple[Pass, list[tuple[str, Pass]]]:
    """All animals in one line; then one at a time, in the given order or from the most legs to the fewest."""
    animals = list(metadata["animals"].items())

    def at_once() -> tuple[int, list[Piece]]:
        products = [count * ANIMALS[animal] for animal, count in animals]
        total, piece = _result(rng, sum(products), FIRST_SLIPS)
        written = " + ".join(map(str, products))
        return total, [Piece(f"The legs are {written} ="), piece, Piece(".\n\n")]

    def one_at_a_time(chosen: Sequence[tuple[str, int]]) -> tuple[int, list[Piece]]:
        total, pieces = 0, []
        for place, (animal, count) in enumerate(chosen):
            own, piece = _result(rng, count * ANIMALS[animal], LATER_SLIPS)
            pieces += [Piece(f"{count} {animal}{'s' * (count > 1)} have {count} x {ANIMALS[animal]} ="), piece]
            if place:
                begun = f" legs, and {total} + {own} ="
                total, piece = _result(rng, total + own, LATER_SLIPS)
                pieces += [Piece(begun), piece, Piece(".\n\n")]
            else:
                total = own
                pieces.append(Piece(" legs.\n\n"))
        return total, pieces

    by_legs = sorted(animals, key=lambda one: -ANIMALS[one[0]])
    return at_once, [
        ("Wait, let me count one animal at a time.", partial(one_at_a_time, animals)),
        ("Wait, let me go over it again.", partial(one_at_a_time, animals)),
        ("Alternatively, begin with the animals that have the most legs.", partial(one_at_a_time, by_legs)),
    ]


def gcd(metadata: dict[str, Any], rng: random.Random) -> tuple[Pass, list[tuple[str, Pass]]]:
    """The divisors of the smaller number; then Euclid's algorithm, or the divisors of the larger one."""
    small, large = sorted(metadata["numbers"])

    def by_divisors(number: int, other: int, slip_rate: float) -> tuple[int, list[Piece]]:
        divisors = [one for one in range(1, number + 1) if number % one == 0]
        greatest = max(one for one in divisors if other % one == 0)
        found, piece = _result(rng, greatest, slip_rate)
        listed = ", ".join(map(str, divisors))
        start = f"The divisors of {number} are {listed}. The greatest one that divides {other} is"
        return found, [Piece(start), piece, Piece(".\n\n")]

    def by_remainders() -> tuple[int, list[Piece]]:
        pieces, divided, by = [], large, small
        while by:
            pieces.append(Piece(f"{divided} = {divided // by} x {by} + {divided % by}.\n\n"))
            divided, by = by, divided % by
        return divided, [*pieces, Piece(f"The last divisor is {divided}.\n\n")]

    return partial(by_divisors, small, large, FIRST_SLIPS), [
        ("Wait, let me divide with remainders.", by_remainders),
        ("Wait, let me go over it again.", partial(by_divisors, small, large, LATER_SLIPS)),
        ("Alternatively, take the divisors of the other number.", partial(by_divisors, large, small, LATER_SLIPS)),
    ]


WRITERS = {"chain_sum": sums, "leg_counting": legs, "gcd": gcd}
