"""
Measure how many answers per second are graded by math-verify in this process and by the reward's worker processes.

    python benchmarks/grading.py
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable

from step_trl.rewards.correctness import _POOL, grade_all
from step_trl.rewards.grading import grade


SMALLEST = ("--batch", "4", "--rounds", "1")  # for tests
TIMEOUT = 1.0
HOSTILE = [(r"\boxed{9^{9^{9^{9}}}}", "x"), (r"\boxed{100000000!}", "x + 1")]


def integer_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return boxed integers in plain text, half of them correct."""
    numbers = [rng.randrange(10**6) for _ in range(count)]
    return [(rf"The final answer is \boxed{{{n}}}.", str(n + index % 2)) for index, n in enumerate(numbers)]


def latex_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return formulas with fractions and roots, half of them correct."""
    numbers = [rng.randrange(1, 10**6) for _ in range(count)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="number of answers graded in one call")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rng = random.Random(0)
    ways: dict[str, Callable[[list[tuple[str, str]]], None]] = {
        "math-verify in process, no limit": plain,
        "step_trl, first call": cold,
        "step_trl, later calls": warm,
        f"step_trl, {len(HOSTILE)} of {args.batch} hostile, limit {TIMEOUT:g} s": with_hostile,
    }
    print(f"Answers per second, batches of {args.batch}, median of {args.rounds}\n")
    print(f"| {'':45} | integers |    LaTeX |\n|{'-' * 47}|---------:|---------:|")
    for name, way in ways.items():
        speeds = []
        for make_pairs in (integer_pairs, latex_pairs):
            seconds = []
            for _ in range(args.rounds):
                pairs = make_pairs(rng, args.batch)
                started = time.perf_counter()
                way(pairs)
                seconds.append(time.perf_counter() - started)
            speeds.append(args.batch / statistics.median(seconds))
        print(f"| {name:45} | {speeds[0]:8,.0f} | {speeds[1]:8,.0f} |", flush=True)


if __name__ == "__main__":
    main()
