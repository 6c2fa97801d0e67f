"""Prompts for critiques and refinements, and the choice of a refinement (Critique-GRPO, arXiv 2506.03106)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, Literal


Critique = Literal["indicative", "indicative_gt", "self", "cot"]

_REFINEMENT = """\
{question}

An earlier solution to this problem:

{solution}

A critique of that solution:

{critique}

Solve the problem anew. Correct the errors of the earlier solution, reason step by step, and put the final answer in \
\\boxed{{}}."""
_CRITIQUE = """\
A problem:

{question}
{reference}
A solution to judge:

{solution}

Check the solution step by step. Name each error and how to correct it. End with a line that is either "Verdict: \
correct" or "Verdict: incorrect"."""
_VERDICT = re.compile(r"verdict\W*(correct|incorrect)", re.IGNORECASE)


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """Return the text of a prompt's last message, or the prompt if it is a string."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def with_question(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """Return a prompt whose last message has another text. Earlier messages, such as a system message, stay."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def indicative_critique(correct: bool, reference: str | None = None) -> str:
    """Return a critique that only tells the verdict and, if it is given, the reference answer."""
    verdict = f"The earlier solution is {'correct' if correct else 'incorrect'}."
    return verdict if reference is None else f"{verdict} The correct answer is {reference}."


def critique_request(question: str, solution: str, reference: str | None = None) -> str:
    """Return a request for a critique that ends with a verdict. A reference solution may be shown to the critic."""
    shown = "" if reference is None else f"\nThe reference solution:\n\n{reference}\n"
    return _CRITIQUE.format(question=question, reference=shown, solution=solution)


def read_verdict(critique: str) -> bool | None:
    """Return whether a critique calls the solution correct, by its last verdict; `None` if it has none."""
    verdicts = _VERDICT.findall(critique)
    return verdicts[-1].lower() == "correct" if verdicts else None


def refinement_request(question: str, solution: str, critique: str) -> str:
    """Return a request for a better solution."""
    return _REFINEMENT.format(question=question, solution=solution, critique=critique)


def select_refinement(scores: Sequence[float], seed: int | None = None) -> int:
    """
    Choose a refinement: the first correct one and, if there is none, a random one.

    Args:
        scores (`Sequence[float]`):
            The score of each refinement, at least one. It is correct if its score is above 0.5.
        seed (`int`, *optional*):
            The seed of the random choice, as in the paper. Without one, the first refinement with the highest score is
            chosen, as in the released code.

    Example:
    ```python
    >>> from step_trl.rollout.refine import select_refinement
    >>> select_refinement([0, 1, 1]), select_refinement([0, 0, 0])
    (1, 0)
    ```
    """
    for index, score in enumerate(scores):
        if score > 0.5:
            return index
    if seed is None:
        return max(range(len(scores)), key=lambda index: scores[index])
    return random.Random(seed).randrange(len(scores))
