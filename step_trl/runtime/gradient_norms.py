"""The gradient of a completion's log-probability with respect to one tensor of the model (GVM, arXiv 2505.02391)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from transformers import PreTrainedModel


@contextmanager
def embedding_gradients(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield the matrix of the input embeddings, with gradients switched on, as they are not with LoRA."""
    weight = cast("torch.nn.Parameter", model.get_input_embeddings().weight)
    frozen = not weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield weight
    finally:
        weight.requires_grad_(not frozen)


def gradient_norm(logps: torch.Tensor, weight: torch.Tensor) -> float:
    """
    Return the Frobenius norm of the gradient of the sum of log-probabilities with respect to one tensor.

    Where the output layer shares the tensor, its part counts. No `.grad` is changed.
    """
    (gradient,) = torch.autograd.grad(logps.sum(), weight)
    return gradient.float().norm().item()


def check_whole_embeddings(zero_stage: int, fsdp_version: int | None) -> None:
    """
    Refuse sharding with which no process has the whole tensor.

    `zero_stage` is 0 without DeepSpeed, and `fsdp_version` `None` without FSDP.
    """
    if zero_stage == 3 or fsdp_version is not None:
        raise ValueError(
            "ratio_by: 'gradient_norm' needs the gradient of a whole tensor, which ZeRO-3 and FSDP divide among the "
            "processes. Set ratio_by='accept_rate', or use DDP or ZeRO-2."
        )
