"""Thoughts that are left out: `<think>`, white space, `</think>` (TON, arXiv 2505.16854)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .text import THINK_END, THINK_START


NO_THOUGHT = "\n\n"


def is_dropped(index: int, probability: float, seed: int) -> bool:
    """Return whether the example with this index loses its thought. It does not depend on other examples."""
    return random.Random(f"{seed}-{index}").random() < probability


def without_thought(completion: str) -> str:
    """
    Return a completion whose thought is two newline characters, or the completion itself if it closes no thought.

    The opening tag is optional, since many chat templates put it into the prompt.
    """
    thought, end, rest = completion.partition(THINK_END)
    if not end:
        return completion
    before, start, _ = thought.partition(THINK_START)
    return (before + start if start else "") + NO_THOUGHT + end + rest


def skip_ratio(completions: Sequence[str]) -> float:
    """Return the share of completions that skip their thought: it is closed, and consists of white space."""
    return sum(map(_is_skipped, completions)) / len(completions)


def _is_skipped(completion: str) -> bool:
    thought, end, _ = completion.partition(THINK_END)
    return bool(end) and not thought.strip().removeprefix(THINK_START).strip()
