r"""
Whether an answer is right: by math-verify, as a letter of several choices, or as a text.

Only what follows the thought is graded. A letter counts where it is given as the answer (in a box, after "answer is",
or alone on the last line), never for standing somewhere in the text: a thought that was cut off, or an answer that
discusses its options, holds many letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..rewards.correctness import answer_text, grade_all


_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_AFTER_PHRASE = re.compile(r"answer\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
# `B`, `(B)`, `B. Seven`, `B) because`, but not `Because`, `A or B`, `(A) or (B)`.
_LETTER = re.compile(
    r"(?:(?i:option|choice)\s+)?\(?([A-Z])(?:\)|[.:]|$)(?!.*\([A-Z]\))(?!(?:\W|and|or)*[A-Z]\W*$)", re.DOTALL
)
_ALONE = re.compile(r"(?:(?i:option|choice)\s+)?\(?([A-Z])[).:]?")
_ESCAPED = re.compile(r"\\[{}]")
_MARKS = " \t\r\n*_`$\"'."


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` that is closed, or `None`; `\{` and `\}` open and close nothing."""
    braces = _ESCAPED.sub("..", text)
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth, begin = 0, start + len(r"\boxed")
        for end in range(begin, len(text)):
            depth += (braces[end] == "{") - (braces[end] == "}")
            if depth == 0:
                return text[begin + 1 : end]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def given_answer(text: str) -> str | None:
    """What a text gives as its answer: its last box, else what follows its last "answer is", else `None`."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _plain(boxed)
    phrases = _AFTER_PHRASE.findall(text)
    return _plain(phrases[-1]) if phrases else None


def last_line(text: str) -> str:
    return _plain(text.strip().rpartition("\n")[2])


def is_choice(text: str, letter: str) -> bool:
    """Whether the answer is this letter; on a last line it must stand alone."""
    answer = given_answer(text)
    found = _ALONE.fullmatch(last_line(text)) if answer is None else _LETTER.match(answer)
    return found is not None and found[1] == letter


def is_text(text: str, solution: str) -> bool:
    """Whether the answer, or else the last line, is this text, but for case, spaces and marks around it."""
    if re.fullmatch(r"\([A-Z]\)", solution):
        return is_choice(text, solution[1])
    answer = given_answer(text)
    return _normal(last_line(text) if answer is None else answer) == _normal(solution)


def _plain(answer: str) -> str:
    """Without the marks and the fonts of LaTeX and Markdown."""
    while (plain := _WRAPPER.sub(r"\1", answer)) != answer:
        answer = plain
    return answer.replace("\\", "").replace("**", "").strip(_MARKS)


def _normal(text: str) -> str:
    return " ".join(text.strip(_MARKS).casefold().split())


def _grade_math(texts: Sequence[str], solutions: Sequence[str]) -> list[bool]:
    return [grade.correct for grade in grade_all(list(zip(texts, solutions, strict=True)))]


def _each(grade: Callable[[str, str], bool]) -> Callable[[Sequence[str], Sequence[str]], list[bool]]:
    return lambda texts, solutions: [grade(*pair) for pair in zip(texts, solutions, strict=True)]


GRADERS: dict[str, Callable[[Sequence[str], Sequence[str]], list[bool]]] = {
    "math": _grade_math,
    "choice": _each(is_choice),
    "text": _each(is_text),
}


def grade(
    grader: str, completions: Sequence[str], solutions: Sequence[str], needs_end_of_thinking: bool
) -> list[bool]:
    """
    Grade completions of problems that share a grader.

    Args:
        grader (`"math"`, `"choice"` or `"text"`):
            How.
        completions (`Sequence[str]`), solutions (`Sequence[str]`):
            Whole completions, and the solution of each one's problem: a letter for `"choice"`.
        needs_end_of_thinking (`bool`):
            Whether a completion without `</think>` is wrong; otherwise all of its text is graded.
    """
    texts = [answer_text(completion, needs_end_of_thinking) for completion in completions]
    return GRADERS[grader](texts, solutions)
