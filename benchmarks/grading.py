"""
Prints how many answers per second are graded: math-verify in this process, and the worker processes of the reward.

    python benchmarks/grading.py
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable

from step_trl.rewards.correctness import _POOL, grade_all
from step_trl.rewards.grading import grade


BATCH = 64
ROUNDS = 5
TIMEOUT = 1.0
HOSTILE = [(r"\boxed{9^{9^{9^{9}}}}", "x"), (r"\boxed{100000000!}", "x + 1")]


def integer_pairs(rng: random.Random) -> list[tuple[str, str]]:
    """A box with an integer in plain text, half of them right."""
    numbers = [rng.randrange(10**6) for _ in range(BATCH)]
    return [(rf"The final answer is \boxed{{{n}}}.", str(n + index % 2)) for index, n in enumerate(numbers)]


def latex_pairs(rng: random.Random) -> list[tuple[str, str]]:
    """Fractions and roots in a formula, half of them right."""
    numbers = [rng.randrange(1, 10**6) for _ in range(BATCH)]
    return [
        (rf"So $x = \boxed{{\frac{{{n}\sqrt{{2}}}}{{7}}}}$.", rf"\frac{{{2 * n + 2 * (index % 2)}}}{{7\sqrt{{2}}}}")
        for index, n in enumerate(numbers)
    ]


def plain(pairs: list[tuple[str, str]]) -> None:
    for pair in pairs:
        grade(*pair)


def warm(pairs: list[tuple[str, str]]) -> None:
    grade_all(pairs, timeout=TIMEOUT)


def cold(pairs: list[tuple[str, str]]) -> None:
    _POOL.close()
    warm(pairs)


def with_hostile(pairs: list[tuple[str, str]]) -> None:
    warm(pairs[: -len(HOSTILE)] + HOSTILE)


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rng = random.Random(0)
    ways: dict[str, Callable[[list[tuple[str, str]]], None]] = {
        "math-verify in process, no limit": plain,
        "step_trl, first call": cold,
        "step_trl, later calls": warm,
        f"step_trl, {len(HOSTILE)} of {BATCH} hostile, limit {TIMEOUT:g} s": with_hostile,
    }
    print(f"Answers per second, batches of {BATCH}, median of {ROUNDS}\n")
    print(f"| {'':45} | integers |    LaTeX |\n|{'-' * 47}|---------:|---------:|")
    for name, way in ways.items():
        speeds = []
        for make_pairs in (integer_pairs, latex_pairs):
            seconds = []
            for _ in range(ROUNDS):
                pairs = make_pairs(rng)
                started = time.perf_counter()
                way(pairs)
                seconds.append(time.perf_counter() - started)
            speeds.append(BATCH / statistics.median(seconds))
        print(f"| {name:45} | {speeds[0]:8,.0f} | {speeds[1]:8,.0f} |", flush=True)


if __name__ == "__main__":
    main()
