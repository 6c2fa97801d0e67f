"""Show a training in a notebook: transformers' progress table with the method's metrics, and live rollouts."""

from __future__ import annotations

import time

from transformers import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from .status import RunStatus, short_number


_EVERY = 0.5  # seconds between two updates of the live rollouts


class NotebookView(NotebookProgressCallback):
    """Shows transformers' progress table with the most important metrics of a status, and its live rollouts."""

    training_tracker: NotebookTrainingTracker | None

    def __init__(self, status: RunStatus):
        super().__init__()
        self.status = status
        self._shown = 0.0
        status.listeners.append(self._show_rollouts)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_tracker is not None and self.training_tracker.inner_table is not None:
            self.training_tracker.inner_table[0].extend(self.status.headline)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.eval_strategy == IntervalStrategy.NO and "loss" in (logs or {}) and self.training_tracker is not None:
            values = {"Step": state.global_step, "Training Loss": logs["loss"]}
            self.training_tracker.write_line(values | self._row(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # Of the hundred metrics of TRL's evaluation, show those of the headline. The parent adds the losses.
        metrics = metrics or {}
        tracker = self.training_tracker
        if tracker is not None and tracker.inner_table is not None:
            step = state.global_step if self.first_column == "Step" else int(state.epoch)
            line = dict.fromkeys(tracker.inner_table[0], "No log") | {self.first_column: step}
            tracker.write_line(line | self._row(metrics, "eval_"))
        losses = {key: value for key, value in metrics.items() if key.endswith("_loss")}
        super().on_evaluate(args, state, control, losses, **kwargs)

    def _row(self, logs, prefix: str = "") -> dict[str, str]:
        values = self.status.headline_values(logs, prefix)
        return {label: short_number(values[label]) if label in values else "" for label in self.status.headline}

    def _show_rollouts(self) -> None:
        status, tracker = self.status, self.training_tracker
        if tracker is None or not status.rollouts or time.monotonic() < self._shown + _EVERY:
            return
        self._shown = time.monotonic()
        tracker.update(
            max(tracker.value or 0, status.update),
            comment=f"{status.phase}: {status.ended} of {status.rollouts} rollouts, {status.tokens_per_second:,.0f} "
            f"tokens/s, {status.exits} exits",
            force_update=True,
        )
