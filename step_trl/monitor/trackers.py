"""
Log more than the trainer's metrics to experiment trackers: completions of all logged steps, traces, histograms, and
the method's symbols. Weights & Biases, Trackio and TensorBoard each get what they can show.

The runs are those that transformers' own callbacks have opened. This module opens none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from .monitor import Monitor
from .samples import as_text


PREFIX = "completions_log"
TABLE, TRACE = f"{PREFIX}/table", f"{PREFIX}/trace"
NUM_TRACES = 3  # per log


class TrackerCallback(TrainerCallback):
    """
    Record, with each training log of the trainer:

    - `completions_log/table`: `num_completions_to_log` completions with their prompt, its solution, whether they are
      correct, their rewards, their advantage, and any other columns. All logged steps are kept.
    - `completions_log/trace-1`, `-2`, `-3`: the first ones as pictures, see [`~step_trl.report.render_rollout`].
    - histograms of values since the last log, such as the confidences of probes.

    Args:
        monitor ([`Monitor`]), symbols (`Mapping[str, Any]`):
            The trainer's monitor, and the values of the method's symbols, for the run's configuration.
        logs (`Mapping[str, Any]`), completions (`int`):
            TRL's `_logs`, with the last logged prompts, completions, rewards and advantages, and how many to log.
        handler ([`~transformers.trainer_callback.CallbackHandler`]):
            The handler of the trainer's callbacks, including TensorBoard's.
    """

    def __init__(
        self,
        monitor: Monitor,
        symbols: Mapping[str, Any],
        logs: Mapping[str, Any],
        completions: int,
        handler: CallbackHandler,
    ):
        self.monitor = monitor
        self.symbols = symbols
        self.logs = logs
        self.completions = completions
        self.handler = weakref.proxy(handler)  # the handler refers to this callback, and to the model
        self._wandb_table: Any = None  # keeps all logged rows

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        symbols = {"method": self.monitor.status.method, "symbols": dict(self.symbols)}
        backends = self._backends(args)
        if (wandb := backends.get("wandb")) is not None:
            wandb.config.update(symbols, allow_val_change=True)
            # The table of runs shows the last value of a metric, and for rewards also the best.
            for key in self.monitor.status.headline.values():
                goal = "last" if "completions" in key else "last,max"
                wandb.define_metric(f"train/{key}", step_metric="train/global_step", summary=goal)
        if (trackio := backends.get("trackio")) is not None:
            trackio.config.update(symbols)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not (args.report_to and state.is_world_process_zero and "loss" in (logs or {})):
            return
        step, observed = state.global_step, self.monitor.take_observations()
        rows = self._rows(step)
        traces = self.monitor.traces(NUM_TRACES)
        for name, module in self._backends(args).items():
            media: dict[str, Any] = {f"train/{key}": module.Histogram(values) for key, values in observed.items()}
            if len(rows):
                media[TABLE] = self._table(name, module, rows)
            media |= {f"{TRACE}-{number}": module.Html(trace.html) for number, trace in enumerate(traces, 1)}
            if media:
                module.log(media | {"train/global_step": step})
        self._to_tensorboard(step, observed, rows)

    def _backends(self, args) -> dict[str, Any]:
        """Return the packages that the trainer reports to and that have a run, by name."""
        runs: dict[str, Callable[[Any], Any]] = {
            "wandb": lambda wandb: wandb.run,
            "trackio": lambda trackio: trackio.context_vars.current_run.get(),
        }
        modules = {name: import_module(name) for name in runs if name in (args.report_to or ())}
        return {name: module for name, module in modules.items() if runs[name](module) is not None}

    def _rows(self, step: int) -> pd.DataFrame:
        """Return the first completions of the last scored batch, in the format of TRL's own table."""
        logged, number = self.logs, self.completions
        columns: dict[str, Sequence[Any]] = {
            name: [as_text(messages) for messages in list(logged[name])[:number]] for name in ("prompt", "completion")
        }
        for extra in (logged["rewards"], logged["extra"], {"advantage": logged["advantages"]}):
            columns |= {name: list(values)[:number] for name, values in extra.items()}
        rows = pd.DataFrame(columns).assign(step=step)
        first = [name for name in ("step", "prompt", "solution", "completion", "correct") if name in rows]
        return rows[[*first, *rows.columns.drop(first)]]

    def _table(self, backend: str, module: Any, rows: pd.DataFrame) -> Any:
        if backend == "trackio":  # Trackio keeps every logged table
            return module.Table(dataframe=rows)
        if self._wandb_table is None:
            self._wandb_table = module.Table(columns=list(rows.columns), log_mode="INCREMENTAL")
        for row in rows[self._wandb_table.columns].itertuples(index=False):
            self._wandb_table.add_data(*row)
        return self._wandb_table

    def _to_tensorboard(self, step: int, observed: Mapping[str, Sequence[float]], rows: pd.DataFrame) -> None:
        for callback in self.handler.callbacks:
            writer = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
            if writer is None:
                continue
            for key, values in observed.items():
                writer.add_histogram(f"train/{key}", pd.Series(values).to_numpy(float), step)
            for number, row in enumerate(rows.head(NUM_TRACES).to_dict("records"), 1):
                parts = [
                    f"{name}: {row[name]}" for name in ("prompt", "solution", "correct", "completion") if name in row
                ]
                text = "\n".join(f"    {line}" for line in "\n\n".join(parts).splitlines())
                writer.add_text(f"{TABLE}/{number}", text, step)
