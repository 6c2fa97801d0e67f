"""Assignment of sequences to the slots of the cache: prefix lookup, forks, eviction, compaction."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .row_cache import RowCache
from .sampling import SamplingOptions, sample, uniforms


# State of a slot: `tokens` holds `known` tokens of its sequence, and the cache the first `cached` of them.
# Sampling began at position `start` and ends at `limit`; up to there, the tokens of a `forced` sequence are given.
# `used` orders retained sequences by their last use.
_SLOT = np.dtype(
    [(name, np.int64) for name in ("known", "cached", "start", "limit", "used", "stop", "top_k")]
    + [(name, np.float64) for name in ("temperature", "top_p", "min_p")]
    + [("seed", np.uint64), ("active", np.bool_), ("watched", np.bool_), ("forced", np.bool_)]
)


class RowTable:
    """
    Running and retained sequences in slots. [`RowTable.compact`] moves the running ones to the first slots.

    Positions below `cached` do not change while a sequence is in its slot, so any sequence can be copied from.
    """

    def __init__(self, new_cache: Callable[[], RowCache], max_rows: int, max_length: int):
        self.new_cache = new_cache
        self.max_rows = max_rows
        self.max_length = max_length
        self._clock = itertools.count(1)
        self._allocate(min(16, max_rows), min(128, max_length))

    def clear(self) -> None:
        """Remove all sequences and free their memory. The size needed so far is allocated again on demand."""
        self._allocate(*self.tokens.shape)

    def _allocate(self, num_slots: int, length: int) -> None:
        self.cache = self.new_cache()
        self.state = np.zeros(0, dtype=_SLOT)
        self.tokens = np.zeros((0, 0), dtype=np.int64)  # (slots, length)
        self.logprobs = np.zeros((0, 0), dtype=np.float32)  # (slots, length), of the sampled tokens
        self.requests: list[Any] = []  # the running request of each slot, or `None`
        self.num_active = 0
        self._options: SamplingOptions | None = None
        self._resize(num_slots, length)

    def longest_prefix(self, prompt: np.ndarray) -> tuple[int, int, int]:
        """
        Find the slot with the longest cached prefix of a prompt, whose last token is always computed, for its logits.

        Returns the slot, the length of the prefix, and how much longer a prefix will become once the running sequences
        are prefilled.
        """
        width = min(len(prompt) - 1, self.tokens.shape[1])
        if width == 0:
            return 0, 0, 0
        same = self.tokens[:, :width] == prompt[:width]
        common = np.where(same.all(axis=1), width, same.argmin(axis=1))
        shared = self.cache.reusable(common, self.state["cached"])
        # Prefer a retained sequence: it can be taken over without a copy.
        source = int((2 * shared + ~self.state["active"]).argmax())
        coming = self.cache.reusable(common, self.state["known"] - 1)[self.state["active"]]
        return source, int(shared[source]), int(coming.max(initial=shared[source]) - shared[source])

    def place(self, request: Any, prompt: np.ndarray, source: int, shared: int) -> int:
        """Assign a slot to the request. The first `shared` tokens of its prompt are cached in slot `source`."""
        self.reserve(len(prompt))
        retained = self.state[source]
        adopted = not retained["active"] and 2 * shared > retained["cached"]
        slot = source if adopted else self._vacate()
        if not adopted:
            self.cache.copy(source, slot, shared)
            if shared:
                self.state["used"][source] = next(self._clock)
        self.tokens[slot, : len(prompt)] = prompt
        self.requests[slot] = request
        self.num_active += 1
        self._options = None
        self.state["known"][slot] = self.state["start"][slot] = len(prompt)
        self.state["cached"][slot] = shared
        self.state["active"][slot] = True
        return slot

    def release(self, slot: int) -> None:
        """End the request of a slot and retain its sequence."""
        self.requests[slot] = None
        self.num_active -= 1
        self._options = None
        self.state["active"][slot] = False
        self.state["used"][slot] = next(self._clock)

    def sample(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """
        Sample the next token of the running sequences from logits (N, V), unless it is given. Returns ids and
        log-probabilities.
        """
        state = self.state[: self.num_active]
        if self._options is None:  # a sequence has started or ended
            self._options = SamplingOptions.from_rows(state, logits.device)
        random_numbers = torch.from_numpy(uniforms(state["seed"], state["known"] - state["start"]))
        forced = None
        if state["forced"].any():
            given = self.tokens[np.arange(self.num_active), state["known"]]
            forced = torch.from_numpy(np.where(state["forced"], given, -1)).to(logits.device)
        ids, logprobs = sample(logits, self._options, random_numbers.to(logits.device), forced)
        return ids.cpu().numpy(), logprobs.cpu().numpy()

    def compact(self) -> None:
        """Move the running sequences to the first slots."""
        active = self.state["active"]
        holes = np.flatnonzero(~active[: self.num_active])
        movers = self.num_active + np.flatnonzero(active[self.num_active :])
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.cache.swap(hole, mover, int(self.state["cached"][[hole, mover]].max()))
            for array in (self.state, self.tokens, self.logprobs):
                array[[hole, mover]] = array[[mover, hole]]
            self.requests[hole], self.requests[mover] = self.requests[mover], self.requests[hole]

    def reserve(self, length: int) -> None:
        """Grow the slots to `length` tokens, at least."""
        if length > self.cache.length:
            self._resize(len(self.state), min(max(length, 2 * self.cache.length), self.max_length))

    def _vacate(self) -> int:
        """Return a slot for a new sequence: an empty one, a new one, or that of the least recently used sequence."""
        empty = np.flatnonzero(self.state["known"] == 0)
        if len(empty):
            return int(empty[0])
        num_slots = len(self.state)
        if num_slots < self.max_rows:
            self._resize(min(2 * num_slots, self.max_rows), self.cache.length)
            return num_slots
        retained = np.flatnonzero(~self.state["active"])
        return int(retained[self.state["used"][retained].argmin()])

    def _resize(self, num_slots: int, length: int) -> None:
        old_slots, old_length = self.tokens.shape
        rows, columns = (0, num_slots - old_slots), (0, length - old_length)
        self.state = np.pad(self.state, rows)
        self.tokens = np.pad(self.tokens, (rows, columns))
        self.logprobs = np.pad(self.logprobs, (rows, columns))
        self.requests += [None] * rows[1]
        self.cache.resize(num_slots, length)
