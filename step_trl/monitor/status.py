"""What a training is doing at this moment. The trainer tells it, views read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from transformers import TrainerCallback

from ..rollout import DynamicTruncatedRollout, Rollout


class RunStatus(TrainerCallback):
    """
    A training at this moment.

    Args:
        method (`str`):
            Name of the method.
        headline (`Mapping[str, str]`):
            Label to key of the few metrics that matter first.

    Attributes:
        phase (`str`):
            `"starting"`, `"rollouts"`, `"rewards"`, `"update"`, `"evaluation"` or `"done"`.
        update (`int`), updates (`int`):
            Updates that are done, of how many.
        rollouts (`int`), ended (`int`), exits (`int`):
            Of the generation under way or the last one, on this process: completions asked for, ended, and ended
            early. 0 where generation is TRL's own.
        logs (`Mapping[str, float]`):
            What was logged last.
        listeners (`list[Callable[[], None]]`):
            Called whenever something has changed.
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
        """Say what is done from now on."""
        self.phase = phase
        self._tell()

    @contextmanager
    def following(self, rollout: DynamicTruncatedRollout, number: int) -> Iterator[Callable[[int, Rollout], None]]:
        """Count `number` rollouts. Yields what is to be told each one that ends."""
        before = rollout.sampled_tokens
        self.rollouts, self.ended, self.exits = number, 0, 0
        self._rollouts_began, self._rollouts_ended = time.monotonic(), None
        self._sampled = lambda: rollout.sampled_tokens - before

        def note(place: int, ended: Rollout) -> None:
            self.ended += 1
            self.exits += ended.truncated
            self._tell()

        try:
            yield note
        finally:
            tokens = self._sampled()
            self._sampled = lambda: tokens
            self._rollouts_ended = time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        """Of the rollouts under way, or of the last ones; probes included. 0 where generation is TRL's own."""
        until = time.monotonic() if self._rollouts_ended is None else self._rollouts_ended
        seconds = until - self._rollouts_began
        return self._sampled() / seconds if self.rollouts and seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """As long as the updates so far took, for those that are left; `None` before the first one ends."""
        done = self.update - self._first_update
        return (time.monotonic() - self._began) / done * (self.updates - self.update) if done else None

    def headline_values(self, logs: Mapping[str, float] | None = None, prefix: str = "") -> dict[str, float]:
        """Label to value of the metrics of `headline` that are in `logs`, by default the last ones."""
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
        if self.headline_values(logs or {}):  # not the totals at the end
            self.logs = dict(logs or {})
            self._tell()

    def on_train_end(self, args, state, control, **kwargs):
        self.enter("done")

    def _tell(self) -> None:
        for listener in self.listeners:
            listener()


def short_time(seconds: float | None) -> str:
    """`"1:02:03"`, `"2:03"`, or `"?"`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short_number(value: float) -> str:
    """`"0.719"`, `"3.500"`, `"12.5"`, `"1,024"`."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"
