"""Thoughts that are left out: `<think>`, white space, `</think>` (TON, arXiv 2505.16854)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .text import THINK_END, THINK_START, completion_text


NO_THOUGHT = "\n\n"


def drop_thought(completion: str, index: int, probability: float, seed: int) -> str:
    """Return the completion of the example with this index, with or without its thought, whatever the others are."""
    return without_thought(completion) if random.Random(f"{seed}-{index}").random() < probability else completion


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


def skipped_thoughts(completions: Sequence[str] | Sequence[list[dict]]) -> list[bool]:
    """Return which completions, texts or messages, skip their thought: it is closed, and consists of white space."""
    parts = [completion_text(completion).partition(THINK_END) for completion in completions]
    return [bool(end) and not thought.strip().removeprefix(THINK_START).strip() for thought, end, _ in parts]
