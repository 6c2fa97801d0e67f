"""The format reward: one closed thought, then an answer."""

from __future__ import annotations

from ..text import THINK_END, THINK_START


def _text(completion: str | list[dict]) -> str:
    """Text of a completion; of a conversation, what the assistant wrote."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion if message["role"] == "assistant")


def _is_well_formed(text: str) -> bool:
    thought, end, answer = text.partition(THINK_END)
    thought = thought.strip().removeprefix(THINK_START)
    tags = thought.count(THINK_START) + answer.count(THINK_START) + answer.count(THINK_END)
    return bool(end and thought.strip() and answer.strip()) and tags == 0


def format_reward(completions: list[str] | list[list[dict]], **kwargs) -> list[float]:
    """
    Reward function that is 1.0 where the completion is one thought, closed by `</think>`, and an answer, else 0.0.

    Neither thought nor answer may be blank, and there is one `</think>`. A `<think>` may only stand at the very start,
    where it is optional: many chat templates put it into the prompt.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts, or conversations of which the assistant's messages are read.
        **kwargs:
            What TRL passes to reward functions and this one does not use.

    Returns:
        `list[float]`: 1.0 or 0.0 for each completion.
    """
    return [float(_is_well_formed(_text(completion))) for completion in completions]
