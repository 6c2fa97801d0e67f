"""A key-value cache with one slot per sequence, each sequence at its own position."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


def count_layers(model: PreTrainedModel) -> int:
    """Number of attention layers. Raises where a layer keeps anything else than keys and values of all positions."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"model: attention implementation {attention!r} is not supported by TransformersEngine. Load the model "
            "with attn_implementation='sdpa', or use a vLLM engine."
        )
    layers = DynamicCache(config=model.config).layers
    other = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if other or not layers:
        raise ValueError(
            f"model: {model.config.model_type!r} has layers that TransformersEngine does not support (cache layers "
            f"{sorted(other)}; sliding windows and recurrent states are among them). Use a vLLM engine."
        )
    return len(layers)


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, length, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # no cycle: what it holds is large, and must go when the cache does

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty: what lies beyond a row's end is multiplied by an attention weight of 0, and 0 * NaN is NaN.
        shape = (self.cache.num_slots, key_states.size(1), self.cache.length)
        self.keys = key_states.new_zeros(*shape, key_states.size(-1))
        self.values = value_states.new_zeros(*shape, value_states.size(-1))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, columns, read, length = self.cache.window
        self.keys[slots, :, columns] = key_states.transpose(1, 2)  # (rows, tokens, heads, head_dim)
        self.values[slots, :, columns] = value_states.transpose(1, 2)
        return self.keys[read, :, :length], self.values[read, :, :length]

    def resize(self, num_slots: int, length: int) -> None:
        def grown(old: torch.Tensor) -> torch.Tensor:
            new = old.new_zeros(num_slots, old.size(1), length, old.size(3))
            new[: old.size(0), :, : old.size(2)] = old
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window[-1], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """
    Preallocated keys and values, written at explicit slots and positions and read as a view of leading positions.

    The model must be called with explicit `position_ids` and a 4-D attention mask after [`RowCache.select`].

    Args:
        num_layers (`int`):
            Number of attention layers.
    """

    def __init__(self, num_layers: int):
        self.num_slots = 0
        self.length = 0
        self._row_layers = [_RowLayer(self) for _ in range(num_layers)]
        super().__init__(layers=[*self._row_layers])

    def select(self, slots: np.ndarray, columns: torch.Tensor, length: int) -> None:
        """The next forward writes to `columns` (rows, tokens) of `slots` (rows,), and reads `length` positions."""
        contiguous = int(slots[-1] - slots[0]) == len(slots) - 1
        rows = torch.from_numpy(slots).to(columns.device)
        read = slice(int(slots[0]), int(slots[-1]) + 1) if contiguous else rows
        self.window = (rows[:, None], columns, read, length)

    def resize(self, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length
        for layer in self._row_layers:
            if layer.is_initialized:
                layer.resize(num_slots, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot."""
        for buffer in self._buffers():
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for buffer in self._buffers():
            kept = buffer[first, :, :length].clone()
            buffer[first, :, :length] = buffer[second, :, :length]
            buffer[second, :, :length] = kept

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._row_layers if layer.is_initialized for buffer in (layer.keys, layer.values)]
