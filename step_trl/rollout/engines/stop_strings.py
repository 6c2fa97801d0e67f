"""Stop strings over sampled tokens: exact, with string work only for the few tokens that could complete one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...steps import token_bytes


class StopStrings:
    """
    Sets of stop strings and the tokens that can complete one of a set.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives the bytes of the tokens.
        vocab_size (`int`):
            Number of token ids that the model can sample, which may exceed the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self._tokenizer = tokenizer
        self._table: list[bytes] = []
        self._sets: dict[tuple[str, ...], int] = {(): 0}
        self._stops: list[list[bytes]] = [[]]
        self.candidates = np.zeros((1, vocab_size), dtype=bool)  # (sets, V)

    def index(self, stop: Sequence[str]) -> int:
        """Number of the set; its row in `candidates`."""
        key = tuple(stop)
        if key not in self._sets:
            if not self._table:
                self._table = token_bytes(self._tokenizer)
                self._table += [b""] * (self.candidates.shape[1] - len(self._table))
            stops = [string.encode() for string in key]
            self.candidates = np.vstack([self.candidates, self._find_candidates(stops)])
            self._stops.append(stops)
            self._sets[key] = len(self._stops) - 1
        return self._sets[key]

    def completed(self, index: int, token_ids: Sequence[int]) -> bool:
        """Whether the last of `token_ids` completes a stop string of the set in the text of them all."""
        stops = self._stops[index]
        if not stops:
            return False
        tail = self._table[token_ids[-1]]
        enough = len(tail) + max(map(len, stops)) - 1
        for token_id in token_ids[-2::-1]:
            if len(tail) >= enough:
                break
            tail = self._table[token_id] + tail
        return any(stop in tail for stop in stops)

    def _find_candidates(self, stops: list[bytes]) -> np.ndarray:
        """Tokens that hold a stop string, or begin with the end of one."""
        ends = tuple({stop[i:] for stop in stops for i in range(len(stop))})
        flags = [piece.startswith(ends) or any(stop in piece for stop in stops) for piece in self._table]
        return np.array(flags[: self.candidates.shape[1]])
