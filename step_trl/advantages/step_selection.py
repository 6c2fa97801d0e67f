"""Step-level advantage selection of SAS (Eq. 3 to 5, arXiv 2604.24003), from completions to tokens."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch

from ..checks import check_choice


Selection = Literal["both", "correct", "failed"]
Criterion = Literal["confidence", "random"]
Granularity = Literal["step", "token"]


def _step_index(step_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Return an index `(B, T)` into a table of steps `(B, S + 1)`, whose last column is for tokens without a step, and S.
    """
    num_steps = max(1, int(step_ids.max()) + 1) if step_ids.numel() else 1  # a table is never empty
    return torch.where(step_ids >= 0, step_ids, num_steps), num_steps


def _step_lengths(index: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return the number of tokens of each step `(B, S)`, 0 for steps that a row does not have."""
    table = index.new_zeros(len(index), num_steps + 1)
    return table.scatter_add_(1, index, torch.ones_like(index))[:, :num_steps]


def step_confidences(token_logps: torch.Tensor, step_ids: torch.Tensor) -> torch.Tensor:
    """
    Return the mean log-probability of the tokens of each step (Eq. 3).

    Args:
        token_logps (`torch.Tensor` of shape `(B, T)`):
            The log-probability of each token under the current policy. Where `step_ids` is -1, values are ignored,
            even NaN.
        step_ids (`torch.LongTensor` of shape `(B, T)`):
            The step of each token, 0, 1, 2, ... per row, -1 for tokens without a step.

    Returns:
        `torch.Tensor` of shape `(B, S)`: The confidences in at least float32, NaN for steps that a row does not have.
        S is the largest number of steps of a row, and at least 1.
    """
    index, num_steps = _step_index(step_ids)
    logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    table = logps.new_zeros(len(index), num_steps + 1)
    sums = table.scatter_add(1, index, logps)[:, :num_steps]
    return sums / _step_lengths(index, num_steps)


def _number_selected(
    num_steps: torch.Tensor, correct: torch.Tensor, ratio: float, failed_step_advantage: float
) -> torch.Tensor:
    """Return how many of the `num_steps` `(B,)` of each completion are selected to get another advantage `(B,)`."""
    # This is computed in integers: in floats, ceil((1 - 0.7) * 10) is 4.
    exact = Fraction(ratio).limit_denominator(10**9)
    top, bottom = exact.numerator, exact.denominator
    lost = -(-top * num_steps // bottom)
    if failed_step_advantage == 0:
        changed = top * num_steps // bottom
    else:
        changed = -(-(bottom - top) * num_steps // bottom)
    return torch.where(correct, lost, changed)


def _random_confidences(present: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return uniform noise `(B, S)` instead of confidences, drawn on the generator's device."""
    device = present.device if generator is None else generator.device
    noise = torch.rand(present.shape, generator=generator, device=device).to(present.device)
    return noise.masked_fill(~present, torch.nan)


@torch.no_grad()
def select_step_advantages(
    advantages: torch.Tensor,
    token_logps: torch.Tensor,
    step_ids: torch.Tensor,
    correct: torch.Tensor,
    ratio: float = 0.3,
    failed_step_advantage: float = 1.0,
    selection: Selection = "both",
    criterion: Criterion = "confidence",
    granularity: Granularity = "step",
    generator: torch.Generator | None = None,
    *,
    selection_bug_compatible: bool = False,
    spare_negative: bool = False,
) -> torch.Tensor:
    """
    Give each token the advantage of its completion, except in the steps that SAS selects.

    The N steps of a completion are sorted by ascending confidence, with ties in order of position. In a correct
    completion, the first `ceil(r * N)` steps get advantage 0 (Eq. 4). In a failed one, the last `ceil((1 - r) * N)`
    steps get `failed_step_advantage` (Eq. 5). If that is 0, only the last `floor(r * N)` steps do: this is the rule of
    the paper's later version. Tokens without a step keep the advantage of their completion.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`), correct (`torch.BoolTensor` of shape `(B,)`):
            The advantage of each completion, and whether its answer is correct.
        token_logps (`torch.Tensor` of shape `(B, T)`), step_ids (`torch.LongTensor` of shape `(B, T)`):
            As in [`step_confidences`].
        ratio (`float`, *optional*, defaults to `0.3`):
            The ratio r, between 0 and 1.
        failed_step_advantage (`float`, *optional*, defaults to `1.0`):
            The advantage of the selected steps of failed completions.
        selection (`"both"`, `"correct"` or `"failed"`, *optional*, defaults to `"both"`):
            The completions in which steps are selected. The others keep their advantage.
        criterion (`"confidence"` or `"random"`, *optional*, defaults to `"confidence"`):
            How steps are selected. `"random"` selects as many at random, drawn from a `generator` (*optional*).
        granularity (`"step"` or `"token"`, *optional*, defaults to `"step"`):
            The unit of selection. `"token"` treats each token of a step as a separate step.
        selection_bug_compatible (`bool`, *optional*, defaults to `False`):
            Whether to reproduce a bug of the released code: whatever the ratio, all steps of correct completions get
            0, and nothing changes in failed ones.
        spare_negative (`bool`, *optional*, defaults to `False`):
            Whether to leave correct completions with a negative advantage unchanged. With 0/1 rewards there are none.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The advantages, of the same dtype as `advantages`.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} is not between 0 and 1. Set the share of steps to mask, for example 0.3.")
    check_choice("selection", selection, Selection)
    check_choice("criterion", criterion, Criterion)
    check_choice("granularity", granularity, Granularity)
    correct = correct.bool()
    if granularity == "token":
        in_step = step_ids >= 0
        step_ids = torch.where(in_step, in_step.cumsum(dim=1) - 1, -1)
    index, num_steps = _step_index(step_ids)
    present = _step_lengths(index, num_steps) > 0  # (B, S)
    confidences = step_confidences(token_logps, step_ids)
    if criterion == "random":
        confidences = _random_confidences(present, generator)

    steps_per_row = present.sum(dim=1)  # (B,)
    number = _number_selected(steps_per_row, correct, ratio, failed_step_advantage)
    if selection_bug_compatible:
        number = torch.where(correct, steps_per_row, 0)
    if selection != "both":
        number = torch.where(correct == (selection == "correct"), number, 0)
    if spare_negative:
        number = torch.where(correct & (advantages < 0), 0, number)

    ranks = confidences.argsort(dim=1, stable=True).argsort(dim=1)  # (B, S), ascending; missing steps (NaN) come last
    first = torch.where(correct, 0, steps_per_row - number)
    selected = (ranks >= first[:, None]) & (ranks < (first + number)[:, None])
    selected = torch.nn.functional.pad(selected, (0, 1)).gather(1, index)  # (B, T), False without a step
    replacement = torch.where(correct, 0.0, failed_step_advantage).to(advantages.dtype)  # (B,)
    return torch.where(selected, replacement[:, None], advantages[:, None])


def selection_statistics(
    advantages: torch.Tensor,
    selected: torch.Tensor,
    confidences: torch.Tensor,
    step_ids: torch.Tensor,
    correct: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Return what a selection has changed, as tensors whose means are of interest, each with the mask of what counts.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`), selected (`torch.Tensor` of shape `(B, T)`):
            The advantages before and after the selection.
        confidences (`torch.Tensor` of shape `(B, S)`):
            The confidence of each step, see [`step_confidences`].
        step_ids (`torch.LongTensor` of shape `(B, T)`), correct (`torch.BoolTensor` of shape `(B,)`):
            The arguments of [`select_step_advantages`].

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: The shares of thought tokens whose advantage was set to 0 or to
        another value, the confidences of steps that were changed and of the others, and the numbers of steps.
    """
    thought = step_ids >= 0  # (B, T)
    changed = (selected != advantages.unsqueeze(1)) & thought
    zeroed, rewarded = changed & (selected == 0), changed & (selected != 0)
    right, wrong = correct.unsqueeze(1) & thought, ~correct.unsqueeze(1) & thought
    token_confidences = confidences.gather(1, step_ids.clamp(min=0))  # (B, T)
    steps = step_ids.amax(dim=1) + 1
    return {
        "tokens_zeroed/correct": (zeroed, right),
        "tokens_zeroed/failed": (zeroed, wrong),
        "tokens_rewarded/failed": (rewarded, wrong),
        "confidence/changed": (token_confidences, changed),
        "confidence/kept": (token_confidences, thought & ~changed),
        "steps/mean": (steps, torch.ones_like(steps, dtype=torch.bool)),
    }
