"""Where on its way a rollout reaches a boundary that a truncation callback named."""

from __future__ import annotations

from collections.abc import Iterator

from ..steps import TriggerSegmenter
from .records import Rollout
from .truncation import Boundary, ProbeRecord, TruncationCallback


class Watch:
    """One callback's view of one rollout."""

    def __init__(self, callback: TruncationCallback, segmenter: TriggerSegmenter | None, positions: Iterator[int]):
        self.callback = callback
        self.segmenter = segmenter
        self.positions = positions
        self.next_position: int | None = 0
        self.number = 0
        self.probes: list[ProbeRecord] = []
        self._pass_positions(0)

    def boundary(self, rollout: Rollout, new_tokens: int, remaining: int) -> Boundary | None:
        """The boundary of this callback that ends the path, if one does."""
        path = rollout.completion_ids
        start = self._trigger_start(path, new_tokens)
        on_time = self.next_position == len(path)
        self._pass_positions(len(path))
        if start is None and not on_time:
            return None
        return Boundary(
            rollout.prompt_ids, path, len(path) if start is None else start, remaining, self.number, self.probes
        )

    def _pass_positions(self, length: int) -> None:
        while self.next_position is not None and self.next_position <= length:
            self.next_position = next(self.positions, None)

    def _trigger_start(self, path: list[int], new_tokens: int) -> int | None:
        """First token of the trigger that ends the path: "await" and "Waiting" stop an engine but are no triggers."""
        if self.segmenter is None:
            return None
        # The trigger lies in the new tokens; the token before tells whether a letter stands in front of it.
        offset = max(0, len(path) - new_tokens - 1)
        triggers = self.segmenter.occurrences(path[offset:])
        return offset + triggers[-1][0] if triggers and offset + triggers[-1][1] == len(path) else None
