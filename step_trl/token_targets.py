"""Prompts that ask for a number of tokens."""

from __future__ import annotations

import datasets
import numpy as np

from .data import build_prompt


TARGET_COLUMN = "target_tokens"  # the number of tokens that the prompt asks for


def validate_targets(
    dataset: datasets.Dataset | datasets.IterableDataset, length_reward: str, name: str = "dataset"
) -> None:
    """
    Raise an error if the rows lack the target lengths that `length_reward` needs. `name` is that of the data set.
    """
    first = next(iter(dataset))
    if not isinstance(first.get(TARGET_COLUMN), int):
        raise ValueError(
            f"{name}: length_reward={length_reward!r} needs a column {TARGET_COLUMN!r} with a number of tokens; "
            f"columns found: {', '.join(first)}. Add it with `step_trl.token_targets.add_token_targets`."
        )


def ask_for_tokens(prompt: list[dict], tokens: int, at_most: bool = False) -> list[dict]:
    """Return the messages, with a last message that asks for a length in L1's words."""
    return build_prompt(prompt, f"{{problem}} Think for {'maximum ' if at_most else ''}{tokens} tokens.", None)


def add_token_targets(
    dataset: datasets.Dataset,
    lowest: int = 100,
    highest: int = 4000,
    *,
    at_most: bool = False,
    seed: int = 0,
) -> datasets.Dataset:
    """
    Ask for a length in each prompt, as L1 does (arXiv 2503.04697): "Think for 512 tokens."

    Args:
        dataset (`Dataset`):
            The rows, with `prompt` as messages that end with the user's message.
        lowest (`int`, *optional*, defaults to `100`), highest (`int`, *optional*, defaults to `4000`):
            The inclusive range of the number of tokens, which is drawn for each row. With equal values, all prompts
            ask for the same token budget, as in an evaluation.
        at_most (`bool`, *optional*, defaults to `False`):
            Whether to ask "Think for maximum 512 tokens." (L1-Max).
        seed (`int`, *optional*, defaults to `0`):
            The seed of the draws.

    Returns:
        `Dataset`: The rows, with `target_tokens`.

    Example:
    ```python
    >>> rows = add_token_targets(load_problems("agentica-org/DeepScaleR-Preview-Dataset"))
    ```
    """
    if not 0 < lowest <= highest:
        raise ValueError(f"lowest, highest: {lowest} and {highest} are not a valid range. Set 0 < lowest <= highest.")
    targets = np.random.default_rng(seed).integers(lowest, highest, size=len(dataset), endpoint=True).tolist()

    def asking(row: dict, index: int) -> dict:
        return {"prompt": ask_for_tokens(row["prompt"], targets[index], at_most), TARGET_COLUMN: targets[index]}

    return dataset.map(asking, with_indices=True)
