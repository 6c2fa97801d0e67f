"""The loss of NFT (Negative-aware Fine-Tuning, arXiv 2505.18116): likelihood training that also uses failures."""

from __future__ import annotations

import torch


LARGEST_LOG_RATIO = 10.0
LOWEST_RATE, HIGHEST_RATE = 0.02, 0.98
OMEGAS = (0, 1, 2)


def nft_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    correct: torch.Tensor,
    correct_rate: torch.Tensor,
    clamp_negative: float = 1.0,
    negative_weight: float = 1.0,
    omega: int = 1,
    *,
    mask: torch.Tensor | None = None,
    sequence_level: bool = False,
) -> torch.Tensor:
    """
    Compute the negative log-likelihood of correct completions, and of what is left of the old policy without them.

    Let R = pi / pi_old for a token, and let r be the share of correct completions in its group. The old policy splits
    into r times a policy of correct completions, which the model is trained to match, and 1 - r times one of failed
    completions:

    - a token of a correct completion has the loss `-log(R)`;
    - a token of a failed one has `-log(max(proxy, clamp_negative))` with `proxy = (1 - r * R) / (1 - r)`. The maximum
      only changes the value: its gradient is that of the proxy.

    Both are multiplied by the weight that `omega` selects. Where R is 1, the gradient with respect to a
    log-probability is minus the advantage of Dr.GRPO for `omega=1`, and of GRPO (with the population's standard
    deviation) for `omega=2`: the loss only differs from theirs in later updates on the same completions. The value of
    the loss says little, since it is 0 where R is 1.

    As in the released code, r is limited to 0.02 and 0.98, and `log(R)` to at most 10, beyond which a token has no
    gradient. A group whose completions are all correct or all failed has the loss 0; the paper samples another group
    instead.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`), old_logps (`torch.Tensor` of shape `(B, T)`):
            The log-probability of each token under the policy, and under the one that sampled the completions.
        correct (`torch.BoolTensor` of shape `(B,)`), correct_rate (`torch.Tensor` of shape `(B,)`):
            Whether each completion is correct, and the share of correct ones in its group, 0 to 1.
        clamp_negative (`float`, *optional*, defaults to `1.0`):
            The paper's epsilon: the lower bound of the proxy, positive. The paper also tried 0.5.
        negative_weight (`float`, *optional*, defaults to `1.0`):
            The weight of failed completions. With 0, this is RFT, which trains on correct ones alone.
        omega (`int`, *optional*, defaults to `1`):
            The weight of a group: 0 for 1, 1 for `1 - r`, 2 for `sqrt((1 - r) / r)`.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 for the tokens that count. The others have the loss 0. By default, all tokens count.
        sequence_level (`bool`, *optional*, defaults to `False`):
            Whether R is the ratio of the whole completion. The loss is then per completion, too, and spread evenly
            over its tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The loss of each token, to be minimised. At least float32.
    """
    _validate(logps, old_logps, correct, correct_rate, mask)
    if not clamp_negative > 0:
        raise ValueError(f"clamp_negative: {clamp_negative} is not positive. Set the paper's 1.0, or for example 0.5.")
    if not negative_weight >= 0:
        raise ValueError(
            f"negative_weight: {negative_weight} is negative. Set 0 to leave failed completions out (RFT), 1 for NFT."
        )
    if omega not in OMEGAS:
        raise ValueError(f"omega: {omega!r} is not known. Set one of {', '.join(map(str, OMEGAS))}.")
    log_ratio, tokens = _log_ratio(logps, old_logps, mask, sequence_level)
    kept, rate = _kept_and_rate(correct_rate, log_ratio)
    proxy = _proxy(log_ratio, rate)
    clamped = torch.where(proxy >= clamp_negative, proxy, clamp_negative + (proxy - proxy.detach()))
    weight = (torch.ones_like(rate), 1 - rate, ((1 - rate) / rate).sqrt())[omega] * kept
    loss = weight * torch.where(correct.bool()[:, None], -log_ratio, -negative_weight * clamped.log())
    if sequence_level:
        loss = loss / tokens.sum(1, keepdim=True).clamp(min=1)
    return loss * tokens


@torch.no_grad()
def nft_statistics(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    correct: torch.Tensor,
    correct_rate: torch.Tensor,
    clamp_negative: float = 1.0,
    *,
    mask: torch.Tensor | None = None,
    sequence_level: bool = False,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Compute statistics that show how far [`nft_loss`] is from GRPO's loss, which its value does not show.

    A mean over several processes is the sum of all values that count, divided by their number.

    Args:
        logps, old_logps, correct, correct_rate, clamp_negative, mask, sequence_level:
            As in [`nft_loss`].

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: For each name, values and a mask of the same shape.
        `kept_groups` `(B, 1)` marks completions in groups with both correct and failed ones, and all completions
        count. The others have the shape `(B, T)`, or `(B, 1)` with `sequence_level`, and failed completions in such
        groups count: `neg_clamped_frac` marks where the proxy is below `clamp_negative`, and `ratio_neg_mean` is R.
    """
    _validate(logps, old_logps, correct, correct_rate, mask)
    log_ratio, tokens = _log_ratio(logps, old_logps, mask, sequence_level)
    kept, rate = _kept_and_rate(correct_rate, log_ratio)
    if sequence_level:
        tokens = tokens.amax(1, keepdim=True)
    negative = (tokens * kept).bool() & ~correct.bool()[:, None]
    return {
        "kept_groups": (kept, torch.ones_like(kept, dtype=torch.bool)),
        "neg_clamped_frac": ((_proxy(log_ratio, rate) < clamp_negative).to(log_ratio), negative),
        "ratio_neg_mean": (log_ratio.exp(), negative),
    }


def correct_rates(correct: torch.Tensor, groups: torch.Tensor, scored: torch.Tensor | None = None) -> torch.Tensor:
    """
    Return the share of correct completions in each completion's group, float32 `(B,)`.

    Args:
        correct (`torch.BoolTensor` of shape `(B,)`), groups (`torch.LongTensor` of shape `(B,)`):
            Whether each completion is correct, and the id of its group.
        scored (`torch.BoolTensor` of shape `(B,)`, *optional*):
            Which completions count. The others get 0, so that [`nft_loss`] leaves them out. By default, all count.
    """
    scored = torch.ones_like(correct) if scored is None else scored
    totals = torch.zeros(2, int(groups.max()) + 1, device=correct.device)
    totals.index_add_(1, groups, torch.stack([correct & scored, scored]).float())
    return torch.where(scored, totals[0, groups] / totals[1, groups].clamp(min=1), 0)


def _log_ratio(
    logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor | None, sequence_level: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `log(R)` of tokens `(B, T)` or of completions `(B, 1)`, and 1 for the tokens that count `(B, T)`."""
    tokens = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()
    log_ratio = logps.to(torch.promote_types(logps.dtype, torch.float32)) - old_logps
    log_ratio = torch.where(tokens, log_ratio, 0)
    if sequence_level:
        log_ratio = log_ratio.sum(1, keepdim=True)
    return log_ratio.clamp(max=LARGEST_LOG_RATIO), tokens.to(log_ratio)


def _kept_and_rate(correct_rate: torch.Tensor, log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 for completions of groups with both kinds of completions `(B, 1)`, and r within limits `(B, 1)`."""
    rate = correct_rate.to(log_ratio)[:, None]
    return ((rate > 0) & (rate < 1)).to(rate), rate.clamp(LOWEST_RATE, HIGHEST_RATE)


def _proxy(log_ratio: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Return the ratio of the policies of failed completions, new to old."""
    return (1 - rate * log_ratio.exp()) / (1 - rate)


def _validate(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    correct: torch.Tensor,
    correct_rate: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    for name, values, shape in (
        ("old_logps", old_logps, logps.shape),
        ("correct", correct, logps.shape[:1]),
        ("correct_rate", correct_rate, logps.shape[:1]),
        ("mask", mask, logps.shape),
    ):
        if values is not None and values.shape != shape:
            raise ValueError(
                f"{name}: the shape {tuple(values.shape)} does not fit logps of the shape {tuple(logps.shape)}. Give "
                f"{tuple(shape)}."
            )
    if not ((correct_rate >= 0) & (correct_rate <= 1)).all():
        raise ValueError(
            f"correct_rate: {correct_rate.tolist()} has values outside 0 to 1. Give the share, not the number, of "
            "correct completions of each completion's group."
        )
