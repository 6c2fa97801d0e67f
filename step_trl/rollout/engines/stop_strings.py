"""Exact detection of stop strings in sampled tokens. Only tokens that could complete one are compared as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...steps import token_bytes


class StopStrings:
    """
    Sets of stop strings, each with the tokens that can complete one of them.

    The model samples ids below `vocab_size`. Ids that exceed the tokenizer's have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self._tokenizer = tokenizer
        self._table: list[bytes] = []
        self._sets: dict[tuple[str, ...], int] = {(): 0}
        self._stops: list[list[bytes]] = [[]]
        self.candidates = np.zeros((1, vocab_size), dtype=bool)  # (sets, V)
        self._candidate_ids: list[frozenset[int]] = [frozenset()]  # the same as sets

    def index(self, stop: Sequence[str]) -> int:
        """Return the index of a set, which is its row in `candidates`."""
        key = tuple(stop)
        if key not in self._sets:
            if not self._table:
                self._table = token_bytes(self._tokenizer)
                self._table += [b""] * (self.candidates.shape[1] - len(self._table))
            stops = [string.encode() for string in key]
            self.candidates = np.vstack([self.candidates, self._find_candidates(stops)])
            self._candidate_ids.append(frozenset(np.flatnonzero(self.candidates[-1]).tolist()))
            self._stops.append(stops)
            self._sets[key] = len(self._stops) - 1
        return self._sets[key]

    def completed(self, index: int, token_ids: Sequence[int], end: int | None = None) -> bool:
        """Whether the last token of `token_ids[:end]` completes a stop string of the set in their text."""
        stops = self._stops[index]
        if not stops:
            return False
        last = (len(token_ids) if end is None else end) - 1
        tail = self._piece(token_ids[last])
        enough = len(tail) + max(map(len, stops)) - 1
        for position in range(last - 1, -1, -1):
            if len(tail) >= enough:
                break
            tail = self._piece(token_ids[position]) + tail
        return any(stop in tail for stop in stops)

    def first_completed(self, index: int, token_ids: Sequence[int], start: int = 0) -> int | None:
        """Return the end (exclusive) of the first token from `start` on that completes a stop string of the set."""
        candidates, new = self._candidate_ids[index], token_ids[start:]
        if candidates.isdisjoint(new):
            return None
        for end, token_id in enumerate(new, start + 1):
            if token_id in candidates and self.completed(index, token_ids, end):
                return end
        return None

    def _piece(self, token_id: int) -> bytes:
        return self._table[token_id] if token_id < len(self._table) else b""

    def _find_candidates(self, stops: list[bytes]) -> np.ndarray:
        """Flag the tokens that contain a stop string or start with the end of one."""
        ends = tuple({stop[i:] for stop in stops for i in range(len(stop))})
        flags = [piece.startswith(ends) or any(stop in piece for stop in stops) for piece in self._table]
        return np.array(flags[: self.candidates.shape[1]])
