"""Train with any per-token loss in TRL's own `_compute_loss`, using advantages that give the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from trl import GRPOConfig


LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo")


def loss_as_advantages(
    inputs: dict[str, Any],
    logps: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Make TRL's `_compute_loss` follow the gradient of another loss.

    `_compute_loss` reads advantages and old log-probabilities after its forward pass. If the old log-probabilities
    equal the policy's, each ratio is 1, inside the clip range, and the gradient of a token's loss with respect to its
    log-probability is minus its advantage. So the advantages are set to minus the gradient of the other loss. TRL's KL
    term, entropy bonus, correction for vLLM and normaliser stay as they are.

    This holds for the options that [`check_loss_options`] accepts. The value of TRL's `loss` is not that of the other
    loss, its clip ratios are 0, and `use_bias_correction_kl` has nothing to correct, since it sees ratios of 1.

    Args:
        inputs (`dict`):
            The inputs that `_compute_loss` reads. `old_per_token_logps` and `advantages` are replaced, so pass a
            shallow copy: TRL uses its buffered inputs again.
        logps (`torch.Tensor` of shape `(B, T)`):
            The policy's log-probabilities, from the forward pass of `_compute_loss`, detached.
        loss (`callable`):
            A function of log-probabilities `(B, T)`, at least float32, that returns the loss of each token `(B, T)`,
            which may depend on all of them. What it needs of the old policy, read from `inputs` before this call.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The loss of each token, detached, for logging.
    """
    with torch.enable_grad():  # evaluation runs without gradients
        leaf = logps.detach().to(torch.promote_types(logps.dtype, torch.float32)).requires_grad_()
        per_token_loss = loss(leaf)
        if per_token_loss.shape != leaf.shape:
            raise ValueError(
                f"loss: it returned the shape {tuple(per_token_loss.shape)} for log-probabilities of the shape "
                f"{tuple(leaf.shape)}. Return the loss of each token, before mask and mean."
            )
        (gradient,) = torch.autograd.grad(per_token_loss.sum(), leaf)
    inputs["old_per_token_logps"] = logps.detach()
    inputs["advantages"] = -gradient
    return per_token_loss.detach()


def check_loss_options(args: GRPOConfig) -> None:
    """
    Raise a `ValueError` if [`loss_as_advantages`] would not train with the gradient of its loss under these options.

    The loss type must be one of GRPO's, and importance sampling by token. The off-policy mask must not compare with
    old log-probabilities, since these are replaced.
    """
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type: {args.loss_type!r} gives advantages another gradient than GRPO does. Set one of "
            f"{', '.join(map(repr, LOSS_TYPES))}, whose normaliser is then the loss's."
        )
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level: {args.importance_sampling_level!r} mixes the advantages of a completion's "
            "tokens. Set 'token'."
        )
    if args.off_policy_mask_threshold is not None and not args.use_vllm:
        raise ValueError(
            f"off_policy_mask_threshold: {args.off_policy_mask_threshold} masks nothing, since old log-probabilities "
            "are set to the policy's. Leave it out, or set use_vllm=True, with which it compares with vLLM's."
        )
