"""Cache with one slot per sequence. Each sequence has its own position."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)


FULL, SLIDING, CHUNKED, STATES = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
NOTHING = "dummy"


@dataclass(frozen=True)
class LayerKind:
    """
    Kind of a layer's cache, by its name in transformers.

    Full, sliding-window and chunked attention cache keys and values. Linear attention keeps states of a recurrence or
    convolution. A dummy layer keeps nothing, such as one that reads the keys of another. `window` is the width of the
    sliding window or of a chunk.
    """

    name: str
    window: int = 0

    @property
    def has_keys(self) -> bool:
        """Whether it caches keys and values."""
        return self.name not in (STATES, NOTHING)

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether queries attend to keys, given their positions (..., W, 1) and (L,)."""
        seen = keys <= queries
        if self.name == SLIDING:
            seen &= keys > queries - self.window
        elif self.name == CHUNKED:
            seen &= keys // self.window == queries // self.window
        return seen


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind] | None:
    """Return the kind of each cached layer, or `None` if [`RowCache`] does not support one of them."""
    layers = DynamicCache(config=config).layers
    text_config = config.get_text_config(decoder=True)
    names = getattr(text_config, "layer_types", None)
    chunked = names is None and getattr(text_config, "sliding_window", None) is None
    kinds = []
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            kinds.append(LayerKind(FULL))
        elif type(layer) is DynamicSlidingWindowLayer:
            name = CHUNKED if chunked or (names is not None and names[place] == CHUNKED) else SLIDING
            kinds.append(LayerKind(name, layer.sliding_window))
        elif type(layer) is LinearAttentionLayer:
            kinds.append(LayerKind(STATES))
        elif type(layer).__name__ == "DummyLayer":  # transformers before 5.24 has none
            kinds.append(LayerKind(NOTHING))
        else:
            return None
    return kinds or None


class _RowKeys(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, length, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # no cycle: the large buffers are freed with the cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, because positions after a row's end have an attention weight of 0, and 0 * NaN is NaN.
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

        if self.is_initialized:
            self.keys, self.values = grown(self.keys), grown(self.values)

    def copy(self, source: int, target: int, length: int) -> None:
        if self.is_initialized and length:
            for buffer in (self.keys, self.values):
                buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                kept = buffer[first, :, :length].clone()
                buffer[first, :, :length] = buffer[second, :, :length]
                buffer[second, :, :length] = kept

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window[-1], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _RowStates:
    """
    States of one recurrent or convolutional layer, one per slot. The state of an empty sequence is zero.

    `load` copies the states of the current rows to the layer of transformers, and `store` copies them back.
    """

    _NAMES = ("conv_states", "recurrent_states")

    def __init__(self, layer: LinearAttentionLayer):
        self.layer = layer
        self.num_slots = 0
        # By name, in the structure of the layer, for all slots. Empty before the first forward pass.
        self.held: dict[str, Any] = {}

    def load(self, rows: torch.Tensor, begins: bool) -> None:
        for name, states in self.held.items():
            setattr(self.layer, name, tree_map_only(torch.Tensor, lambda state: state[rows], states))
        if self.held:
            self.layer.has_previous_state = tree_map(lambda _: not begins, self.layer.has_previous_state)

    def store(self, rows: torch.Tensor) -> None:
        new = {name: getattr(self.layer, name) for name in self._NAMES}
        if not self.held:
            self.held = tree_map_only(
                torch.Tensor, lambda state: state.new_zeros(self.num_slots, *state.shape[1:]), new
            )
        for held, state in zip(self._tensors(self.held), self._tensors(new), strict=True):
            held[rows] = state

    def resize(self, num_slots: int, length: int) -> None:
        def grown(old: torch.Tensor) -> torch.Tensor:
            return torch.cat([old, old.new_zeros(num_slots - len(old), *old.shape[1:])])

        self.num_slots = num_slots
        self.held = tree_map_only(torch.Tensor, grown, self.held)

    def copy(self, source: int, target: int, length: int) -> None:
        for state in self._tensors(self.held):
            state[target] = state[source] if length else 0

    def swap(self, first: int, second: int, length: int) -> None:
        for state in self._tensors(self.held):
            state[[first, second]] = state[[second, first]]

    @staticmethod
    def _tensors(states: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(states) if isinstance(leaf, torch.Tensor)]


class RowCache(Cache):
    """
    Keys, values and states of each sequence, written at explicit slots and positions.

    Keys and values are preallocated for all positions, also for sliding windows, and read as a view of the leading
    positions. Call the model with explicit `position_ids` and the masks of [`RowCache.masks`], between
    [`RowCache.select`] and [`RowCache.store`]. Without a `config`, the cache has no layers.
    """

    def __init__(self, config: PreTrainedConfig | None = None):
        self.num_slots = 0
        self.length = 0
        self._kinds = [] if config is None else layer_kinds(config) or []
        pairs = zip(self._kinds, DynamicCache(config=config).layers, strict=False)
        layers: list[Any] = [_RowKeys(self) if kind.has_keys else layer for kind, layer in pairs]
        self._states = [_RowStates(layer) for layer in layers if isinstance(layer, LinearAttentionLayer)]
        keys = [layer for layer in layers if isinstance(layer, _RowKeys)]
        self._rows: list[_RowKeys | _RowStates] = [*keys, *self._states]
        super().__init__(layers=layers)

    @property
    def recurrent(self) -> bool:
        """Whether a layer has states. They belong to the whole cached part of a sequence, not to a prefix of it."""
        return bool(self._states)

    def reusable(self, common: np.ndarray, cached: np.ndarray) -> np.ndarray:
        """Return how many tokens of a common prefix can be reused from sequences with `cached` tokens in the cache."""
        if self.recurrent:
            return np.where(common >= cached, cached, 0)
        return np.minimum(common, cached) if self._rows else np.zeros_like(common)

    def masks(self, position_ids: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Return the mask (rows, 1, tokens, length) of each kind of attention by name, True for attended keys."""
        keys, queries = torch.arange(length, device=position_ids.device), position_ids[:, None, :, None]
        return {kind.name: kind.sees(queries, keys) for kind in dict.fromkeys(self._kinds) if kind.has_keys}

    def select(self, slots: np.ndarray, columns: torch.Tensor, length: int, begins: bool = False) -> None:
        """
        Set what the next forward pass uses: it writes to `columns` (rows, tokens) of `slots` (rows,) and reads
        `length` positions. `begins` says that no row has a state yet.
        """
        contiguous = int(slots[-1] - slots[0]) == len(slots) - 1
        self._selected = torch.from_numpy(slots).to(columns.device)
        read = slice(int(slots[0]), int(slots[-1]) + 1) if contiguous else self._selected
        self.window = (self._selected[:, None], columns, read, length)
        for states in self._states:
            states.load(self._selected, begins)

    def store(self) -> None:
        """Store the states after a forward pass. Keys and values are already in place."""
        for states in self._states:
            states.store(self._selected)

    def resize(self, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length
        for rows in self._rows:
            rows.resize(num_slots, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot. A length of 0 empties the target."""
        for rows in self._rows:
            rows.copy(source, target, length)

    def swap(self, first: int, second: int, length: int) -> None:
        """Swap the first `length` positions of two slots."""
        for rows in self._rows:
            rows.swap(first, second, length)
