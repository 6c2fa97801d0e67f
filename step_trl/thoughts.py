"""Thoughts that are left out: `<think>`, white space, `</think>` (TON, arXiv 2505.16854)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .text import THINK_END, THINK_START, completion_text


NO_THOUGHT = "\n\n"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


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


def split_thought(completion: str) -> tuple[str, str]:
    """Return the thought of a completion without its tags, and the text after it. An open thought has no end."""
    thought, _, rest = completion.partition(THINK_END)
    return thought.partition(THINK_START)[2] if THINK_START in thought else thought, rest


def answer_block(completion: str) -> str | None:
    """Return the stripped text of the last `<answer>` block after the thought, or `None` if there is none."""
    blocks = _ANSWER.findall(completion.rpartition(THINK_END)[2])
    return blocks[-1].strip() if blocks else None


def continue_prompt(prompt: str, completion: str) -> str:
    """
    Return a completion as it continues a rendered prompt, which may have opened the thought.

    Many chat templates end the prompt with `<think>` and a newline character. The completion then goes on without
    them. Other completions, such as those that were sampled after this prompt, do not change.
    """
    _, start, opened = prompt.rpartition(THINK_START)
    if not start or opened.strip():
        return completion
    if completion.startswith(THINK_START):
        return completion.removeprefix(THINK_START).removeprefix(opened)
    return completion.removeprefix(opened) if completion.startswith(NO_THOUGHT + THINK_END) else completion
