"""
Whether a text answers a problem rightly, by math-verify; as a script, the worker that `correctness.py` starts.

The worker reads one JSON line `[text, solution, timeout]` at a time from its standard input and writes one back. It is
run by path, so that it imports nothing but math-verify: 0.4 s and 60 MB instead of torch's several seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


MEMORY_LIMIT = 2 * 1024**3


def _extraction(**latex: Any) -> tuple[LatexExtractionConfig, ExprExtractionConfig]:
    """A box before all else, as in TRL's `accuracy_reward`, and DAPO's "Answer: 42" without LaTeX."""
    return (
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, **latex),
        ExprExtractionConfig(try_extract_without_anchor=False),
    )


# As TRL does: an answer must be valid LaTeX, while a solution may be written as data sets do, such as `\frac43`.
ANSWERS, SOLUTIONS = _extraction(normalization_config=NormalizationConfig(units=True)), _extraction()
ANCHOR = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|(?i:answer)")
INTEGER = r"(0|-?[1-9][0-9]{0,14})"
# Nothing around the box that could be LaTeX of its own: only math-verify's pattern for a bare box can match.
BOXED_INTEGER = re.compile(rf"[^\\${{}}\[]*\\boxed\{{{INTEGER}\}}[^\\${{}}\[]*")


class Grade(NamedTuple):
    """
    The verdict on one text.

    Attributes:
        correct (`bool`):
            Whether the answer equals the solution.
        answer_parsed (`bool`, *optional*, defaults to `True`):
            Whether an answer was found in the text.
        solution_parsed (`bool`, *optional*, defaults to `True`):
            Whether the solution could be read; if not, nothing is correct.
        killed (`bool`, *optional*, defaults to `False`):
            Whether grading ran into the limit of time or memory; then it counts as not correct.
    """

    correct: bool
    answer_parsed: bool = True
    solution_parsed: bool = True
    killed: bool = False


def compare_integers(text: str, solution: str) -> Grade | None:
    r"""
    Decide a text whose only LaTeX is one `\boxed{integer}`, for an integer solution; `None` for all others.

    Both are exact integers to math-verify as well, so its verdict is the same one.
    """
    boxed = BOXED_INTEGER.fullmatch(text)
    # math-verify reads "final answer is 4. I hope" with the priority of a box.
    if boxed is None or "I hope" in text or not re.fullmatch(INTEGER, solution):
        return None
    return Grade(boxed[1] == solution)


def parse_answer(text: str) -> list:
    return parse(text, ANSWERS, extraction_mode="first_match", parsing_timeout=None)


@lru_cache(maxsize=1024)  # the completions of a group share it
def parse_solution(solution: str) -> list:
    r"""
    Read a solution. A bare value is boxed first: math-verify would find `2` in `2\sqrt{3}` and nothing in `B`.
    """
    if ANCHOR.search(solution):
        return parse(solution, parsing_timeout=None)
    return parse(rf"\boxed{{{solution}}}", SOLUTIONS, extraction_mode="first_match", parsing_timeout=None)


def grade(text: str, solution: str) -> Grade:
    """
    Grade in this process, without any time limit.

    Args:
        text (`str`):
            What the model answered, without its thought.
        solution (`str`):
            The value, or a text that contains it as LaTeX.
    """
    expected = parse_solution(solution)
    if not expected:
        return Grade(False, solution_parsed=False)
    answer = parse_answer(text)
    return Grade(verify(expected, answer, timeout_seconds=None), answer_parsed=bool(answer))


def main() -> None:
    """Grade standard input line by line; the kernel ends this process when one line takes too long."""
    # Without a Python handler SIGALRM kills, also in the middle of C code, and also when the parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ValueError):  # a lower hard limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    replies, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        text, solution, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        verdict = grade(text, solution)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
