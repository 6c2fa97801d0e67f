"""The current status of a training, which the trainer updates and views read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from transformers import TrainerCallback

from ..rollout import DynamicTruncatedRollout, Rollout, TreeRollout


class RunStatus(TrainerCallback):
    """
    The current status of a training.

    Args:
        method (`str`):
            The name of the method.
        headline (`Mapping[str, str]`):
            The keys of the most important metrics, by their labels.

    Attributes:
        phase (`str`):
            The current phase: `"starting"`, `"rollouts"`, `"rewards"`, `"update"`, `"evaluation"` or `"done"`.
        update (`int`), updates (`int`):
            The number of finished updates, and of all updates.
        rollouts (`int`), ended (`int`), exits (`int`):
            The number of completions that are requested, ended, and ended early in this process's current or last
            generation. 0 if TRL generates. With `rollouts_ahead`, those of the next batch during an update.
        logs (`Mapping[str, float]`):
            The last logs.
        listeners (`list[Callable[[], None]]`):
            Functions to call after every change.
    """

    def __init__(self, method: str, headline: Mapping[str, str]):
        self.method = method
        self.headline = headline
        self.phase = "starting"
        self.update = self.updates = self._first_update = 0
        self.rollouts = self.ended = self.exits = 0
        self.logs: Mapping[str, float] = {}
        self.listeners: list[Callable[[], None]] = []
        self._began = self._rollouts_began = time.monotonic()
        self._rollouts_ended: float | None = None
        self._sampled: Callable[[], int] = int

    def enter(self, phase: str) -> None:
        """Set the current phase."""
        self.phase = phase
        self._tell()

    @contextmanager
    def following(
        self, rollout: DynamicTruncatedRollout | TreeRollout, number: int
    ) -> Iterator[Callable[[int, Rollout], None]]:
        """Count `number` rollouts. Yield a function to call with each rollout that ends."""
        try:
            yield self.follow(rollout, number)
        finally:
            tokens = self._sampled()
            self._sampled = lambda: tokens
            self._rollouts_ended = time.monotonic()

    def follow(
        self, rollout: DynamicTruncatedRollout | TreeRollout, number: int, *, from_background: bool = False
    ) -> Callable[[int, Rollout], None]:
        """
        Count `number` rollouts. Return a function to call with each rollout that ends.

        With `from_background`, it is called in another thread. Listeners hear of it only while the training waits for
        rollouts: at other times, they are busy with the training itself.
        """
        before = rollout.sampled_tokens
        self.rollouts, self.ended, self.exits = number, 0, 0
        self._rollouts_began, self._rollouts_ended = time.monotonic(), None
        self._sampled = lambda: rollout.sampled_tokens - before

        def note(place: int, ended: Rollout) -> None:
            self.ended += 1
            self.exits += ended.truncated
            if self.ended == number:
                self._rollouts_ended = time.monotonic()
            if not from_background or self.phase == "rollouts":
                self._tell()

        return note

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the current or the last rollouts, including probes. 0 if TRL generates."""
        until = time.monotonic() if self._rollouts_ended is None else self._rollouts_ended
        seconds = until - self._rollouts_began
        return self._sampled() / seconds if self.rollouts and seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds for the remaining updates at the pace so far, or `None` before the first update ends."""
        done = self.update - self._first_update
        return (time.monotonic() - self._began) / done * (self.updates - self.update) if done else None

    def headline_values(self, logs: Mapping[str, float] | None = None, prefix: str = "") -> dict[str, float]:
        """Return the values of the `headline` metrics in `logs`, by default the last logs, by their labels."""
        logs = self.logs if logs is None else logs
        return {
            label: logs[prefix + key] for label, key in self.headline.items() if logs.get(prefix + key) is not None
        }

    def on_train_begin(self, args, state, control, **kwargs):
        self.update = self._first_update = state.global_step
        self.updates = state.max_steps
        self._began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.update = state.global_step
        self._tell()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.headline_values(logs or {}):  # ignore the totals at the end
            self.logs = dict(logs or {})
            self._tell()

    def on_train_end(self, args, state, control, **kwargs):
        self.enter("done")

    def _tell(self) -> None:
        for listener in self.listeners:
            listener()


def short_time(seconds: float | None) -> str:
    """Format seconds as `"1:02:03"`, `"2:03"`, or `"?"`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short_number(value: float) -> str:
    """Format a number as `"0.719"`, `"3.500"`, `"12.5"`, or `"1,024"`."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"
