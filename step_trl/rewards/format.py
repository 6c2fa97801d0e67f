"""Format rewards: one closed thought, followed by an answer, with or without tags of its own."""

from __future__ import annotations

import re

from ..text import THINK_END, THINK_START, completion_text


_STRICT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_LENIENT = re.compile(r"(<think>)?((?!</?think>).)*</think>\s*<answer>((?!</?answer>).)*</answer>", re.DOTALL)


def _is_well_formed(text: str) -> bool:
    thought, end, answer = text.partition(THINK_END)
    thought = thought.strip().removeprefix(THINK_START)
    tags = thought.count(THINK_START) + answer.count(THINK_START) + answer.count(THINK_END)
    return bool(end and thought.strip() and answer.strip()) and tags == 0


def format_reward(completions: list[str] | list[list[dict]], **kwargs) -> list[float]:
    """
    Return 1.0 for completions that consist of one thought, closed by `</think>`, and an answer, and 0.0 for others.

    Neither the thought nor the answer may be blank, and there must be exactly one `</think>`. A `<think>` is allowed
    only at the very start, where it is optional: many chat templates put it into the prompt. Of `completions` that are
    conversations, only the assistant's messages are read. `kwargs` are what else TRL passes to reward functions.
    """
    return [float(_is_well_formed(completion_text(completion))) for completion in completions]


def think_answer_format_reward(
    completions: list[str] | list[list[dict]], *, strict: bool = False, **kwargs
) -> list[float]:
    """
    Return 1.0 for a thought and an answer, each in its own tags, and 0.0 for others (TON, arXiv 2505.16854).

    The thought may be blank. White space is allowed between the blocks, and around them. There is one block of each
    kind, and the opening `<think>` is optional, since many chat templates put it into the prompt.

    With `strict=True`, the released code's expression decides: `<think>` is needed, white space at the end is not
    allowed, and further blocks are. `kwargs` are what else TRL passes to reward functions.
    """
    if strict:
        return [float(_STRICT.fullmatch(completion_text(completion)) is not None) for completion in completions]
    return [float(_LENIENT.fullmatch(completion_text(completion).strip()) is not None) for completion in completions]
