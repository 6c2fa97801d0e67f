r"""
What is wrong with a rollout, even if its answer is right: it repeats itself, is too long, or contradicts its answer.

VerIPO (arXiv 2505.19000) has these four checks: accuracy, consistency, repetition and length. Their rules and
thresholds are not published: those here are ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..rewards import extract_answers
from ..text import last_boxed


NEEDED = ("group", "thought", "answer", "correct", "truncated", "thought_tokens")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")


def repetition(thought: str, size: int = 4) -> float:
    """
    Return the share of repeated n-grams of words: 1 - distinct / all.

    Args:
        thought (`str`):
            The text. It is split at white space.
        size (`int`, *optional*, defaults to `4`):
            The number of words of an n-gram. A text with fewer words has no repetition.

    Example:
    ```python
    >>> repetition("a b c a b c a b c")
    0.5
    ```
    """
    words = thought.split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def last_value(thought: str) -> tuple[str | None, bool]:
    r"""Return the last boxed value of a thought, or else its last number, and whether it is boxed."""
    if (boxed := last_boxed(thought)) is not None:
        return boxed.strip(), True
    numbers = _NUMBER.findall(thought)
    return (numbers[-1].replace(",", "") if numbers else None), False


def last_named(thought: str, words: Collection[str]) -> str | None:
    """Return the one of these words, or sequences of words, that a thought names last, in lower case."""
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    found = re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", thought, re.IGNORECASE)
    return found[-1].lower() if found else None


def agree(
    thoughts: Sequence[str], answers: Sequence[str | None], groups: Sequence[Hashable] | None = None
) -> list[bool]:
    """
    Return whether each thought leads to its answer, by rule.

    The last boxed value of the thought equals its answer. Without one, the last number does if the answer is a number.
    If it consists of words, such as a colour, it is the last one named of all the answers of its group.
    A thought without such a value counts as consistent, and so does a missing answer.

    Args:
        thoughts (`Sequence[str]`), answers (`Sequence[str]`):
            The thoughts and their answers, `None` where there is none.
        groups (`Sequence[Hashable]`, *optional*):
            The group of each thought. Without groups, answers that consist of words are consistent.
    """
    found = [True] * len(thoughts)
    unlike: list[tuple[int, str, str]] = []
    words: dict[int, str] = {}
    for place, (thought, answer) in enumerate(zip(thoughts, answers, strict=True)):
        value, boxed = last_value(thought)
        if answer is None:
            continue
        if boxed or _NUMBER.fullmatch(answer.replace(",", "")):
            if value is not None and value != answer:
                unlike.append((place, value, answer))
        elif len(answer) > 1 and answer.replace(" ", "").isalpha():  # a single letter may be an article
            words[place] = answer.lower()
    read = extract_answers([rf"\boxed{{{text}}}" for _, *pair in unlike for text in pair])
    for (place, _, _), value, answer in zip(unlike, read[::2], read[1::2], strict=True):
        found[place] = value is not None and value == answer
    if groups is not None:
        choices: defaultdict[Hashable, set[str]] = defaultdict(set)
        for place, word in words.items():
            choices[groups[place]].add(word)
        for place, word in words.items():
            found[place] = last_named(thoughts[place], choices[groups[place]]) in (None, word)
    return found


@dataclass(frozen=True)
class RolloutVerifier:
    r"""
    Checks recorded rollouts.

    Args:
        max_repetition (`float`, *optional*, defaults to `0.5`):
            A thought with a larger share of repeated 4-grams is repetitive, see [`repetition`].
        max_length_ratio (`float`, *optional*, defaults to `2.0`):
            A thought is too long if it has more tokens than this times the median of the correct thoughts of its
            group, or if its completion was truncated. In a group without a correct completion, only truncated ones
            are too long.
        judge_fn (`Callable[[str, str], bool]`, *optional*):
            Returns whether a thought leads to an answer. By default, a rule decides, see [`agree`].
            [`~step_trl.evaluation.ConsistencyJudge`] asks a language model. It is only asked about rollouts with a
            thought and an answer.
        max_concurrent (`int`, *optional*, defaults to `16`):
            The maximum number of threads that call `judge_fn`.
    """

    max_repetition: float = 0.5
    max_length_ratio: float = 2.0
    judge_fn: Callable[[str, str], bool] | None = None
    max_concurrent: int = 16

    def __post_init__(self):
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition: {self.max_repetition} is not a share. Set for example 0.5.")
        if self.max_length_ratio <= 0:
            raise ValueError(f"max_length_ratio: {self.max_length_ratio} is not positive. Set for example 2.0.")
        if self.max_concurrent < 1:
            raise ValueError(f"max_concurrent: {self.max_concurrent} is less than one. Leave it out for the default.")

    def verify(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """
        Return the rollouts with further columns.

        Args:
            rollouts ([`~pandas.DataFrame`]):
                One row per completion, as from [`read_rollouts`]: at least `group`, `thought`, `answer` (`None` if
                there is none), `correct`, `truncated` and `thought_tokens`.

        Returns:
            [`~pandas.DataFrame`]: The rows with `repetition` (`float`), `repetitive`, `too_long`, `consistent` and
            `clean` (`bool`): correct, consistent, and neither repetitive nor too long.
        """
        missing = [name for name in NEEDED if name not in rollouts]
        if missing:
            raise ValueError(
                f"rollouts: there is no column {' and '.join(missing)}. Pass what `read_rollouts` returns."
            )
        found = rollouts.copy()
        found["repetition"] = [repetition(thought) for thought in found["thought"]]
        found["repetitive"] = found["repetition"] > self.max_repetition
        found["too_long"] = found["truncated"] | (found["thought_tokens"] > self._limits(found))
        found["consistent"] = pd.Series(self._consistent(found), index=found.index, dtype=bool)
        found["clean"] = found["correct"] & found["consistent"] & ~found["repetitive"] & ~found["too_long"]
        return found

    def _limits(self, rollouts: pd.DataFrame) -> pd.Series:
        """Return the longest allowed thought of each row's group, infinite without a correct completion."""
        lengths = rollouts["thought_tokens"].where(rollouts["correct"])
        return (lengths.groupby(rollouts["group"]).transform("median") * self.max_length_ratio).fillna(np.inf)

    def _consistent(self, rollouts: pd.DataFrame) -> list[bool]:
        thoughts = rollouts["thought"].tolist()
        answers = [answer if isinstance(answer, str) else None for answer in rollouts["answer"]]
        if self.judge_fn is None:
            return agree(thoughts, answers, rollouts["group"].tolist())
        asked = [place for place, answer in enumerate(answers) if answer is not None and thoughts[place].strip()]
        found = [True] * len(thoughts)
        with ThreadPoolExecutor(self.max_concurrent) as threads:
            verdicts = threads.map(self.judge_fn, [thoughts[i] for i in asked], [answers[i] for i in asked])
            for place, verdict in zip(asked, verdicts, strict=True):
                found[place] = bool(verdict)
        return found
