"""Repeated attempts at a call whose server may be down."""

from __future__ import annotations

import asyncio
import time


_FIRST_DELAY = 0.25


class RetryWindow:
    """
    Counts the failed attempts of one call and waits between them, twice as long each time up to `longest_delay`.

    The call is given up `seconds` after its first failure.
    """

    def __init__(self, seconds: float, longest_delay: float = 5.0):
        self.seconds = seconds
        self.longest_delay = longest_delay
        self.attempts = 0
        self._delay = _FIRST_DELAY
        self._first_failure = self._last_failure = 0.0

    def note_failure(self) -> bool:
        """Count a failed attempt. Returns whether another one may follow."""
        self._last_failure = time.monotonic()
        if self.attempts == 0:
            self._first_failure = self._last_failure
        self.attempts += 1
        return self._left > 0

    async def wait(self) -> None:
        """Wait before the next attempt."""
        await asyncio.sleep(min(self._delay, self._left))
        self._delay = min(2 * self._delay, self.longest_delay)

    @property
    def _left(self) -> float:
        return self._first_failure + self.seconds - self._last_failure

    def __str__(self) -> str:
        elapsed = self._last_failure - self._first_failure
        return f"{self.attempts} attempts in {elapsed:.0f} s (retry_window={self.seconds:g})"
