"""How many completions each prompt gets, for the least variance of the policy's gradient (GVM, arXiv 2505.02391)."""

from __future__ import annotations

from typing import Literal

import torch


Rounding = Literal["residual", "accept_rate"]


def gvm_weights(
    gradient_norms: torch.Tensor, acceptance_rates: torch.Tensor, alpha: float = 1e-3, beta: float = 2.0
) -> torch.Tensor:
    """
    Return the weights `(P,)` that numbers of completions should be proportional to (Proposition 1).

    They are G / sqrt(p + alpha / p^(beta - 1)), and 0 for a prompt without an accepted completion.

    Args:
        gradient_norms (`torch.Tensor` of shape `(P,)`):
            The mean gradient norm G of the accepted completions of each prompt.
        acceptance_rates (`torch.Tensor` of shape `(P,)`):
            The share p of accepted completions of each prompt.
        alpha (`float`, *optional*, defaults to `1e-3`), beta (`float`, *optional*, defaults to `2.0`):
            How much prompts that are almost never solved are held back. With `alpha=0`, the variance is the least.
    """
    solved = acceptance_rates > 0
    rates = torch.where(solved, acceptance_rates, 1)
    return torch.where(solved, gradient_norms / (rates + alpha / rates ** (beta - 1)).sqrt(), 0)


def filter_ratios(
    ratio: torch.Tensor, acceptance_rates: torch.Tensor, total: int, threshold: float = 0.0, insufficient: float = 0.0
) -> torch.Tensor:
    """
    Leave prompts out that are too easy, or of which too few completions would be accepted.

    Args:
        ratio (`torch.Tensor` of shape `(P,)`), acceptance_rates (`torch.Tensor` of shape `(P,)`):
            Each prompt's share of the budget, and of accepted completions.
        total (`int`):
            The budget: the number of completions of all prompts.
        threshold (`float`, *optional*, defaults to `0.0`):
            Leave out prompts with a higher rate. 0 for no limit.
        insufficient (`float`, *optional*, defaults to `0.0`):
            Leave out prompts with a smaller expected number of accepted completions. 0 for no limit.

    Returns:
        `torch.Tensor` of shape `(P,)`: Shares that sum to 1, or all 0 if no prompt is left.
    """
    if threshold > 0:
        ratio = ratio.masked_fill(acceptance_rates > threshold, 0)
    if insufficient > 0:
        ratio = ratio.masked_fill(acceptance_rates * ratio * total < insufficient, 0)
    return ratio / ratio.sum() if ratio.any() else ratio


def preserve_sum(
    ratio: torch.Tensor, total: int, rounding: Rounding = "residual", acceptance_rates: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Round `ratio * total` to integers that sum to `total`.

    They are rounded half to even. What is missing then goes to the prompts with the largest remainders, as in the
    released code, or, with `rounding="accept_rate"`, to those with the lowest rates, as in the paper's text. What is
    too much is taken from the other end. Of equal prompts, the first one changes.

    Args:
        ratio (`torch.Tensor` of shape `(P,)`):
            Each prompt's share of the budget. They sum to 1.
        total (`int`):
            The number of completions of all prompts.
        rounding (`str`, *optional*, defaults to `"residual"`):
            `"residual"` or `"accept_rate"`.
        acceptance_rates (`torch.Tensor` of shape `(P,)`, *optional*):
            The share of accepted completions of each prompt, for `rounding="accept_rate"`.

    Returns:
        `torch.LongTensor` of shape `(P,)`
    """
    shares = ratio.double() * total
    numbers = shares.round()
    missing = total - int(numbers.sum())
    if rounding == "residual":
        order = shares - numbers
    elif acceptance_rates is None:
        raise ValueError("acceptance_rates: None, but rounding='accept_rate' ranks prompts by them. Give them.")
    else:
        order = -acceptance_rates.double()
    # Only prompts with a share can get one more, and only those with a completion can lose one.
    changeable = (ratio > 0) & (numbers >= (0 if missing > 0 else 1))
    ranked = torch.where(changeable, order * (1 if missing > 0 else -1), -torch.inf)
    chosen = ranked.sort(descending=True, stable=True).indices[: abs(missing)]
    numbers[chosen] += 1 if missing > 0 else -1
    return numbers.long()


def fill_batches(numbers: torch.Tensor, size: int) -> list[int]:
    """
    Order prompts, each repeated as often as it is sampled, so that few groups are split between two batches.

    A group that fits goes into the current batch, in the order of the prompts. If none does, the largest is split.

    Args:
        numbers (`torch.Tensor` of shape `(P,)`):
            The number of completions of each prompt.
        size (`int`):
            The number of completions of a batch.

    Returns:
        `list[int]`: The index of the prompt of each completion. The completions of a group are contiguous.
    """
    waiting = {prompt: number for prompt, number in enumerate(numbers.tolist()) if number}
    order: list[int] = []
    while waiting:
        room = size - len(order) % size
        prompt = next((prompt for prompt, number in waiting.items() if number <= room), None)
        if prompt is None:
            prompt = max(waiting, key=waiting.__getitem__)
        taken = min(room, waiting[prompt])
        order += [prompt] * taken
        waiting[prompt] -= taken
        if not waiting[prompt]:
            del waiting[prompt]
    return order
