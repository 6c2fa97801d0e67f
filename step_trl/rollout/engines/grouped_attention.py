"""Attention of one new token per sequence that reads shared keys once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend as transformers' `sdpa_attention_forward` does, but without a copy of shared keys for each query head.

    With grouped-query attention, several query heads share keys and values. If there is a mask, transformers repeats
    them for each head. For a single query, the heads of a group can be the rows of one head instead. Other calls are
    passed on.

    Args:
        module ([`~torch.nn.Module`]):
            The attention layer.
        query, key, value (`torch.Tensor`):
            (N, heads, queries, size), (N, key heads, L, size) and (N, key heads, L, value size).
        attention_mask (`torch.Tensor`, *optional*):
            (N, 1, queries, L), True for attended keys or added to the scores.
        options:
            As for `sdpa_attention_forward`.

    Returns:
        The attention output (N, queries, heads, value size), and `None` in place of the weights.
    """
    rows, heads, queries, size = query.shape
    shared, several_masks = heads // key.size(1), attention_mask is not None and attention_mask.size(1) > 1
    if queries > 1 or shared == 1 or several_masks or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.size(1), shared, size),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return output.reshape(rows, 1, heads, -1), None


@contextmanager
def reading_shared_keys_once() -> Iterator[None]:
    """
    Use [`grouped_attention`] in models with `attn_implementation="sdpa"`.

    The implementation keeps its name, which some models compare with. One that somebody else has put in its place is
    left alone.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # ours, which hides that of transformers
