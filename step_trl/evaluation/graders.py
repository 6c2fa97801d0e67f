r"""
Grade answers: with math-verify, as the letter of a choice, as text, or in a block of their own.

Only the text after the thought is graded. A letter counts only if it is given as the answer (in a box, after "answer
is", or alone on the last line), not if it merely occurs in the text: an unfinished thought, or an answer that
discusses its options, contains many letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..rewards.correctness import answer_text, grade_all, think_answer_accuracy_reward
from ..text import last_boxed


GRADERS = ("math", "choice", "text", "block")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_AFTER_PHRASE = re.compile(r"answer\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
# `B`, `(B)`, `B. Seven`, `B) because`, but not `Because`, `A or B`, `(A) or (B)`.
_LETTER = re.compile(
    r"(?:(?i:option|choice)\s+)?\(?([A-Z])(?:\)|[.:]|$)(?!.*\([A-Z]\))(?!(?:\W|and|or)*[A-Z]\W*$)", re.DOTALL
)
_ALONE = re.compile(r"(?:(?i:option|choice)\s+)?\(?([A-Z])[).:]?")
_MARKS = " \t\r\n*_`$\"'."


def given_answer(text: str) -> str | None:
    """Return the answer that a text gives: its last box, or the text after its last "answer is", or `None`."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _plain(boxed)
    phrases = _AFTER_PHRASE.findall(text)
    return _plain(phrases[-1]) if phrases else None


def last_line(text: str) -> str:
    return _plain(text.strip().rpartition("\n")[2])


def is_choice(text: str, letter: str) -> bool:
    """Return whether the answer is this letter. On the last line, the letter must be alone."""
    answer = given_answer(text)
    found = _ALONE.fullmatch(last_line(text)) if answer is None else _LETTER.match(answer)
    return found is not None and found[1] == letter


def is_text(text: str, solution: str) -> bool:
    """Return whether the answer, or the last line, is this text, ignoring case, spaces and surrounding marks."""
    if re.fullmatch(r"\([A-Z]\)", solution):
        return is_choice(text, solution[1])
    answer = given_answer(text)
    return _normal(last_line(text) if answer is None else answer) == _normal(solution)


def _plain(answer: str) -> str:
    """Remove the marks and fonts of LaTeX and Markdown."""
    while (plain := _WRAPPER.sub(r"\1", answer)) != answer:
        answer = plain
    return answer.replace("\\", "").replace("**", "").strip(_MARKS)


def _normal(text: str) -> str:
    return " ".join(text.strip(_MARKS).casefold().split())


def grade(
    grader: str, completions: Sequence[str], solutions: Sequence[str], needs_end_of_thinking: bool
) -> list[bool]:
    """
    Grade whole completions of problems that share a grader: `"math"`, `"choice"`, `"text"` or `"block"`.

    The solutions for `"choice"` are letters, and answers for `"block"` are in `<answer>` and `</answer>`. If
    `needs_end_of_thinking`, a completion without `</think>` is wrong; otherwise, all of its text is graded.
    """
    texts = [answer_text(completion, needs_end_of_thinking) for completion in completions]
    pairs = list(zip(texts, solutions, strict=True))
    if grader == "math":
        return [grade.correct for grade in grade_all(pairs)]
    if grader == "block":
        return [reward == 1.0 for reward in think_answer_accuracy_reward(texts, list(solutions))]
    is_right = {"choice": is_choice, "text": is_text}[grader]
    return [is_right(*pair) for pair in pairs]
