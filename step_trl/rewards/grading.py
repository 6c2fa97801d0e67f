"""
Grade answers with math-verify. As a script, this is the worker that `correctness.py` starts.

The worker reads one JSON line `[text, solution, timeout, strict_latex]` at a time from standard input and writes one
back: the grade, or the answer of the text if the solution is null. It is run by its path, so that it imports only
math-verify: 0.4 s and 60 MB instead of torch's several seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


MEMORY_LIMIT = 2 * 1024**3


def _extraction(**latex: Any) -> tuple[LatexExtractionConfig, ExprExtractionConfig]:
    """Look for a box first, as in TRL's `accuracy_reward`, and accept DAPO's "Answer: 42" without LaTeX."""
    return (
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, **latex),
        ExprExtractionConfig(try_extract_without_anchor=False),
    )


# As in TRL, only solutions are repaired, such as `sqrt(3)`. Answers are read by LaTeX's own rules, see `as_typeset`.
ANSWERS, SOLUTIONS = _extraction(normalization_config=NormalizationConfig(units=True)), _extraction()
ANCHOR = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|(?i:answer)")
INTEGER = r"(0|-?[1-9][0-9]{0,14})"
# There is nothing around the box that could be LaTeX, so only math-verify's pattern for a bare box can match.
BOXED_INTEGER = re.compile(rf"[^\\${{}}\[]*\\boxed\{{{INTEGER}\}}[^\\${{}}\[]*")
# A root's degree belongs to its command.
COMMAND = r"\\(?:[dtc]?frac|[dt]?binom|sqrt\s*\[[^\]]*\]|sqrt)(?![a-zA-Z])"
TOKEN = re.compile(rf"{COMMAND}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
# `\left.` and `\right.` are delimiters.
FULL_STOP = re.compile(r"(?<!\\right)(?<!\\left)\.(?=\s*(?:\$|\\\)|\\\]|\}))")


class Grade(NamedTuple):
    """The verdict on one text."""

    correct: bool
    answer_parsed: bool = True
    solution_parsed: bool = True  # if not, no answer is correct
    killed: bool = False  # over the limit of time or memory; the answer then counts as not correct


def boxed_integer(text: str) -> str | None:
    r"""The integer of a text whose only LaTeX is one `\boxed{integer}`; `None` for all others."""
    boxed = BOXED_INTEGER.fullmatch(text)
    # math-verify reads "final answer is 4. I hope" with the priority of a box.
    return None if boxed is None or "I hope" in text else boxed[1]


def compare_integers(text: str, solution: str) -> Grade | None:
    r"""
    Grade a text whose only LaTeX is one `\boxed{integer}`, if the solution is an integer. Return `None` for others.

    math-verify also treats both as exact integers, so its verdict would be the same.
    """
    integer = boxed_integer(text)
    if integer is None or not re.fullmatch(INTEGER, solution):
        return None
    return Grade(integer == solution)


def as_typeset(text: str) -> str:
    r"""
    Rewrite LaTeX so that math-verify can parse it, without changing how it is typeset.

    Arguments of fractions, binomial coefficients and roots get the braces that they lack: `\frac43` becomes
    `\frac{4}{3}`. Such an argument is one token, as in TeX: `\frac123` is one half times 3. A full stop at the end of
    a formula is removed, as in `$42.$` and `\boxed{42.}`.
    """
    written = []
    missing = 0  # the number of arguments that the last command still needs
    outside: list[int] = []  # the same, after the end of each open brace
    for token in TOKEN.findall(FULL_STOP.sub("", text)):
        if re.fullmatch(COMMAND, token):
            missing = 1 if token.startswith(r"\sqrt") else 2
        elif token == "{":
            outside.append(max(missing - 1, 0))
            missing = 0
        elif token == "}":
            missing = outside.pop() if outside else 0
        elif token in ("$", r"\)", r"\]", "&", r"\\"):  # the end of a formula, or of a part of it
            missing = 0
        elif missing and token.isspace():
            continue
        elif missing:
            token, missing = "{" + token + "}", missing - 1
        written.append(token)
    return "".join(written)


def parse_answer(text: str, strict_latex: bool = False) -> list:
    r"""Parse an answer. `strict_latex` skips [`as_typeset`]."""
    text = text if strict_latex else as_typeset(text)
    return parse(text, ANSWERS, extraction_mode="first_match", parsing_timeout=None)


@lru_cache(maxsize=1024)  # shared by the completions of a group
def parse_solution(solution: str) -> list:
    r"""
    Parse a solution. A bare value is boxed first: math-verify would find `2` in `2\sqrt{3}` and nothing in `B`.
    """
    if ANCHOR.search(solution):
        return parse(as_typeset(solution), parsing_timeout=None)
    text = as_typeset(rf"\boxed{{{solution}}}")
    return parse(text, SOLUTIONS, extraction_mode="first_match", parsing_timeout=None)


def grade(text: str, solution: str, strict_latex: bool = False) -> Grade:
    """Grade an answer without its thought in this process, without any time limit, see [`math_accuracy_reward`]."""
    expected = parse_solution(solution)
    if not expected:
        return Grade(False, solution_parsed=False)
    answer = parse_answer(text, strict_latex)
    return Grade(verify(expected, answer, timeout_seconds=None), answer_parsed=bool(answer))


def extract(text: str) -> str | None:
    """
    The final answer of a text as math-verify reads it, in this process and without any time limit; `None` without one.

    Answers that are read as the same expression are the same string; a decimal number is its fraction.
    """
    answer = parse_answer(text)
    if not answer:
        return None
    value = answer[0]  # an expression of SymPy, or a text that is none
    is_decimal = not isinstance(value, str) and value.is_Float
    return str(Fraction(str(value))) if is_decimal else str(value)


def main() -> None:
    """Grade standard input line by line. The kernel kills this process if a line takes too long."""
    # Without a Python handler, SIGALRM kills the process, even inside C code, and even if the parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ValueError):  # a lower hard limit is already set
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    replies, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        text, solution, timeout, strict_latex = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        reply = extract(text) if solution is None else grade(text, solution, strict_latex)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
