"""Micro-batches without needless padding: completions of like length together, columns that are padding left out."""

from __future__ import annotations

from typing import Any

import torch


Batch = dict[str, Any]


def sort_by_length(batches: list[Batch], per_update: int) -> list[Batch]:
    """
    Put the rows of each update's micro-batches in the order of their completions' lengths.

    An update sees the same rows as before, so its gradient stays the same where the loss is a sum over rows (or over
    tokens) with one normaliser.

    Args:
        batches (`list[dict]`):
            Micro-batches of equal size as TRL makes them, tensors of shape `(B, ...)` and others. Those of one update
            follow each other.
        per_update (`int`):
            Micro-batches of an update; divides their number.

    Returns:
        `list[dict]`: as many micro-batches of the same sizes.
    """
    sorted_batches: list[Batch] = []
    for start in range(0, len(batches), per_update):
        update = batches[start : start + per_update]
        rows = update[0]["completion_mask"].size(0)
        order = torch.cat([batch["completion_mask"].sum(dim=1) for batch in update]).argsort(stable=True)
        joined = {
            name: torch.cat([batch[name] for batch in update])[order]
            for name, value in update[0].items()
            if _has_rows(value, rows)
        }
        sorted_batches += [
            batch | {name: value[place * rows : (place + 1) * rows] for name, value in joined.items()}
            for place, batch in enumerate(update)
        ]
    return sorted_batches


def trim_padding(batch: Batch) -> Batch:
    """
    Leave out the columns that are padding in every row: of prompts on the left, of completions on the right.

    Args:
        batch (`dict`):
            Tensors of a micro-batch; those of the shape of `completion_ids` `(B, T)` are trimmed with it.

    Returns:
        `dict`: the same rows with fewer columns, at least one.
    """
    completion_shape = batch["completion_mask"].shape
    length = max(1, int(batch["completion_mask"].sum(dim=1).max()))
    trimmed = {
        name: value[:, :length] if torch.is_tensor(value) and value.shape == completion_shape else value
        for name, value in batch.items()
    }
    width = max(1, int(batch["prompt_mask"].sum(dim=1).max()))
    return trimmed | {name: batch[name][:, -width:] for name in ("prompt_ids", "prompt_mask")}


def _has_rows(value: Any, rows: int) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and value.size(0) == rows
