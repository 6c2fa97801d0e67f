"""Reduce the padding of micro-batches: group completions of similar length, and drop columns of padding."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from trl import GRPOConfig, GRPOTrainer


MicroBatch = dict[str, Any]

# Tensors of shape (B, P+C): prompt and completion side by side.
_WHOLE_SEQUENCES = ("token_type_ids", "mm_token_type_ids")
# Their second dimension is not tokens, even if it happens to equal the completions' length.
_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


def reduce_padding(trainer: GRPOTrainer, batches: list[MicroBatch]) -> list[MicroBatch]:
    """Sort the micro-batches of a generation batch by length if that keeps the gradient the same, and trim them."""
    if order_is_free(trainer, batches):
        batches = sort_by_length(batches, trainer.args.gradient_accumulation_steps)
    multiple = cast("int | None", trainer.pad_to_multiple_of)  # TRL has resolved "auto"
    return [trim_padding(batch, multiple) for batch in batches]


def order_is_free(trainer: GRPOTrainer, batches: list[MicroBatch]) -> bool:
    """Return whether the gradient of an update does not depend on which rows share a micro-batch."""
    args = cast("GRPOConfig", trainer.args)
    return (
        cast("int", args.steps_per_generation) % args.gradient_accumulation_steps == 0
        and args.loss_type != "bnpo"  # normalised by the tokens of the micro-batch
        and args.top_entropy_quantile == 1.0  # a quantile of the micro-batch
        and not trainer._entropy_bonus_enabled  # a mean over its tokens
        and not trainer.aux_loss_enabled  # balances the experts within it
        and not any(isinstance(value, list) for value in batches[0].values())  # images
    )


def sort_by_length(batches: list[MicroBatch], per_update: int) -> list[MicroBatch]:
    """
    Sort the rows of each update's micro-batches by the lengths of their completions.

    An update sees the same rows as before, so its gradient stays the same if the loss is a sum over rows (or over
    tokens) with one normaliser. `batches` are micro-batches of equal size from TRL, with tensors of shape `(B, ...)`
    and other values. `per_update` consecutive ones belong to one update, and divide their number.
    """
    sorted_batches: list[MicroBatch] = []
    for start in range(0, len(batches), per_update):
        update = batches[start : start + per_update]
        rows = update[0]["completion_mask"].size(0)
        order = torch.cat([batch["completion_mask"].sum(dim=1) for batch in update]).argsort(stable=True)
        joined = {
            name: torch.cat([batch[name] for batch in update])[order]
            for name, value in update[0].items()
            if torch.is_tensor(value) and value.ndim > 0 and value.size(0) == rows
        }
        sorted_batches += [
            batch | {name: value[place * rows : (place + 1) * rows] for name, value in joined.items()}
            for place, batch in enumerate(update)
        ]
    return sorted_batches


def trim_padding(batch: MicroBatch, multiple: int | None = None) -> MicroBatch:
    """
    Drop the columns that are padding in every row: on the left of prompts, and on the right of completions.

    Tensors with the shape of `completion_ids` `(B, C)` are trimmed with it, and token type ids `(B, P+C)` with both it
    and `prompt_ids` `(B, P)`. At least one column of each stays, and a `multiple` of this, for `pad_to_multiple_of`.
    """
    prompt_mask, completion_mask = batch["prompt_mask"], batch["completion_mask"]
    width = prompt_mask.size(1)
    first = width - _columns_to_keep(prompt_mask, multiple)
    last = _columns_to_keep(completion_mask, multiple)
    columns = dict.fromkeys(("prompt_ids", "prompt_mask"), slice(first, None))
    columns |= dict.fromkeys(_WHOLE_SEQUENCES, slice(first, width + last))
    columns |= {
        name: slice(last)
        for name, value in batch.items()
        if torch.is_tensor(value) and value.shape == completion_mask.shape and name not in (*columns, *_IMAGES)
    }
    return batch | {name: batch[name][:, kept] for name, kept in columns.items() if name in batch}


def _columns_to_keep(mask: torch.Tensor, multiple: int | None) -> int:
    longest = max(1, int(mask.sum(dim=1).max()))
    return min(mask.size(1), math.ceil(longest / (multiple or 1)) * (multiple or 1))
