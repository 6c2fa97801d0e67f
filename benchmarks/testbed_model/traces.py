"""
Write the reasoning traces that the testbed model is pre-trained on, from problems.

A trace is a first pass that takes two numbers at a time (hard for a small model, and harder with larger numbers and
longer chains), followed by re-checks opened by "Wait" or "Alternatively": one number at a time, in smaller parts
(long, reliable), or additions before subtractions. There are always re-checks, even of a correct answer: this is what
overthinking looks like.

A trace is a list of pieces. Slips are written into pieces that carry no loss: the model learns how thinking continues
after a wrong line, but never to write one, so its own errors reflect its ability.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from step_trl.testbed.problems import never_negative


@dataclass(frozen=True)
class Piece:
    """A piece of a trace. Only a `trained` piece contributes to the loss."""

    text: str
    trained: bool = True


OPENINGS = {
    "single": ("Wait, let me take one number at a time.", "Wait, let me go over it again."),
    "parts": ("Wait, let me check that in smaller parts.", "Wait, I should go slower, in parts."),
    "reorder": ("Alternatively, add first and then subtract.", "Alternatively, do the additions first."),
}
TRIGGERS = "Wait|Alternatively"
DRILL_TOTALS = (120, 450)
ANSWER_PROMPT = "\n</think>\n\nThe final answer is"


@dataclass(frozen=True)
class SlipRates:
    """The probabilities of a wrong result in a scripted line."""

    pair: float = 0.3
    single: float = 0.05
    part: float = 0.02


def written_sum(numbers: list[int]) -> str:
    """Return `"59 - 38 + 4"` for `[59, -38, 4]`."""
    return str(numbers[0]) + "".join(f" {'-' if n < 0 else '+'} {abs(n)}" for n in numbers[1:])


class TraceWriter:
    """Writes traces of one problem."""

    def __init__(self, rng: random.Random, slip_rates: SlipRates = SlipRates()):
        self.rng = rng
        self.slip_rates = slip_rates

    def line(self, numbers: list[int], slip_rate: float, end: str = ".\n\n") -> tuple[int, list[Piece]]:
        """Return `"59 - 38 = 21"` and its result, which is wrong with probability `slip_rate`."""
        result = sum(numbers)
        slipped = self.rng.random() < slip_rate
        if slipped:
            result = max(0, result + self.rng.choice((-20, -10, -10, -2, -1, -1, 1, 1, 2, 10, 10, 20)))
        # The space goes with the result: a digit carries it in its token.
        return result, [Piece(f"{written_sum(numbers)} ="), Piece(f" {result}", trained=not slipped), Piece(end)]

    def in_groups(self, terms: list[int], size: int, slip_rate: float) -> tuple[int, list[Piece]]:
        """Write `size` terms per line."""
        total, pieces = terms[0], []
        for start in range(1, len(terms), size):
            total, written = self.line([total, *terms[start : start + size]], slip_rate)
            pieces += written
        return total, pieces

    def pairs(self, terms: list[int]) -> tuple[int, list[Piece]]:
        return self.in_groups(terms, 2, self.slip_rates.pair)

    def single(self, terms: list[int]) -> tuple[int, list[Piece]]:
        return self.in_groups(terms, 1, self.slip_rates.single)

    def reorder(self, terms: list[int]) -> tuple[int, list[Piece]]:
        return self.single([t for t in terms if t >= 0] + [t for t in terms if t < 0])

    def parts(self, terms: list[int]) -> tuple[int, list[Piece]]:
        """Write tens and ones of a term one after the other, on one line."""
        total, pieces = terms[0], []
        for term in terms[1:]:
            parts = split_by_digit(term)
            for part in parts:
                end = ".\n\n" if part is parts[-1] else ". "
                total, written = self.line([total, part], self.slip_rates.part, end)
                pieces += written
        return total, pieces

    def check(self, terms: list[int]) -> tuple[str, int, list[Piece]]:
        """Return the opening of a re-check, its result and its lines."""
        mixed = terms != sorted(terms, key=lambda t: t < 0)
        method = self.rng.choices(("parts", "single", "reorder"), (4, 4, 3 if mixed else 0))[0]
        result, pieces = {"parts": self.parts, "single": self.single, "reorder": self.reorder}[method](terms)
        return self.rng.choice(OPENINGS[method]), result, pieces

    def thought(self, terms: list[int]) -> list[Piece]:
        """Write a first pass and two to five re-checks."""
        first = self.pairs(terms)
        return with_checks(first, partial(self.check, terms), wanted=self.rng.choice((2, 3, 3, 4)), most=5)


def with_checks(
    first: tuple[int, list[Piece]], check: Callable[[], tuple[str, int, list[Piece]]], wanted: int, most: int
) -> list[Piece]:
    """
    Write a first pass and re-checks opened by a trigger word: as many as `wanted`, and more while the last two differ.

    `first` is a result and its lines, and `check` returns an opening, too. There are at most `most` re-checks.
    """
    result, pieces = first
    pieces = [*pieces, Piece(f"So the answer is {result}.\n\n")]
    results = [result]
    while len(results) <= wanted or (results[-1] != results[-2] and len(results) <= most):
        opening, result, lines = check()
        compared = f"This gives {result} again" if result == results[-1] else f"This gives {result}, not {results[-1]}"
        pieces += [Piece(f"{opening}\n\n"), *lines, Piece(f"{compared}.\n\n")]
        results.append(result)
    return [*pieces[:-1], Piece(pieces[-1].text.rstrip())]


def split_by_digit(number: int) -> list[int]:
    """Return `[-300, -7]` for `-307`."""
    digits = str(abs(number))
    sign = -1 if number < 0 else 1
    parts = [sign * int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]


def with_answer(thought: list[Piece], terms: list[int]) -> list[Piece]:
    """Close the thought and state the true answer, whatever the thought found, which calibrates its probability."""
    return [*thought, Piece(f"{ANSWER_PROMPT} \\boxed{{{sum(terms)}}}.")]


def cut_at_trigger(thought: list[Piece], terms: list[int], rng: random.Random) -> list[Piece]:
    """
    Cut the thought at a random re-check, before or after the trigger word.

    Only the answer is trained on: a probe must find the model calibrated, but the model must not learn to stop early
    by itself.
    """
    text = "".join(piece.text for piece in thought)
    triggers = list(re.finditer(TRIGGERS, text))
    trigger = rng.choice(triggers)
    end = trigger.end() if rng.random() < 0.7 else trigger.start()
    prompt, answer = f"{text[:end].rstrip()}{ANSWER_PROMPT} \\boxed{{", f"{sum(terms)}}}."
    return [Piece(prompt, trained=False), Piece(answer)]


def drill(rng: random.Random, lines: int = 12, totals: Sequence[int] = DRILL_TOTALS) -> list[Piece]:
    """
    Return unrelated lines of the kinds that traces consist of. Only the results are trained on.

    The first number of a line is at most one of the `totals`, drawn for each line.
    """
    pieces: list[Piece] = []
    while len(pieces) < 2 * lines:
        term = rng.randint(0, 99)
        if rng.random() < 0.4:
            term = rng.choice(split_by_digit(term))
        numbers = [rng.randint(0, rng.choice(totals)), rng.choice((1, -1)) * term]
        if never_negative(numbers):
            pieces += [Piece(f"{written_sum(numbers)} =", trained=False), Piece(f" {sum(numbers)}.\n\n")]
    return pieces
