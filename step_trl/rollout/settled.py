"""Tokens of a running rollout that no decision can take back, for those who read a completion while it is sampled."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from ..steps import TriggerSegmenter
from .engines import EngineUnavailableError, Generation
from .records import RolloutBuilder


OnTokens = Callable[[list[int]], bool | None]


class SettledTokens:
    """
    Hands on the tokens of one rollout as soon as they are certain to stay in its completion.

    Tokens after an undecided boundary wait for the decision, and so do those that may be the start of a trigger, which
    an exit may cut off.

    Attributes:
        segmenters (`Sequence[TriggerSegmenter]`):
            Those of the callbacks that may still exit.
        stopped (`bool`):
            Whether the reader wants no further tokens.
    """

    def __init__(self, rollout: RolloutBuilder, on_tokens: OnTokens):
        self.segmenters: Sequence[TriggerSegmenter] = ()
        self.stopped = False
        self._rollout = rollout
        self._on_tokens = on_tokens
        self._count = 0  # tokens handed on
        self._arrived: list[int] = []  # tokens of the running call
        self._undecided = False

    def arrive(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Note the tokens of the running call. This is its abandon rule: it ends once the reader has enough."""
        if len(token_ids) < len(self._arrived):
            self._check_handed_on(token_ids)
            self._arrived = []
        self._arrived += token_ids[len(self._arrived) :]
        if not self._undecided:
            self._hand_on(self._certain())
        return self.stopped

    def append(self, segment: Generation, greedy: bool = False) -> None:
        """Append the tokens of a call that has ended. They are handed on when the next decision is known."""
        self._check_handed_on(segment.token_ids)
        self._arrived = []
        self._rollout.append(segment, greedy)

    def await_decision(self, start: int) -> None:
        """Hold back the tokens from position `start` on."""
        self._undecided = True
        self._hand_on(start)

    def go_on(self) -> None:
        """Hand on what waited for a decision: the path stays as it is."""
        self._undecided = False
        self._hand_on(self._certain())

    def discard(self) -> None:
        """Forget the tokens of a call that was cancelled."""
        self._arrived = []

    def end(self) -> None:
        """Hand on the rest of a rollout that has ended."""
        self._hand_on(len(self._rollout.completion_ids))

    def _certain(self) -> int:
        """Length of the path and of what has arrived, without a possible start of a trigger."""
        pending = self._pending()
        return self._count + min([len(pending), *(one.unfinished(pending) for one in self.segmenters)])

    def _pending(self) -> array[int]:
        path = self._rollout.completion_ids
        return path[self._count :] + array("q", self._arrived[max(0, self._count - len(path)) :])

    def _hand_on(self, end: int) -> None:
        if end > self._count and not self.stopped:
            tokens = self._pending()[: end - self._count].tolist()
            self._count = end
            self.stopped = bool(self._on_tokens(tokens))

    def _check_handed_on(self, token_ids: Sequence[int]) -> None:
        """Raise an error if a repeated call has sampled other tokens than those that were handed on."""
        count = max(0, self._count - len(self._rollout.completion_ids))
        if list(token_ids[:count]) != self._arrived[:count]:
            raise EngineUnavailableError(
                "A call was interrupted after some of its tokens had been handed on. Start the rollout again."
            )
