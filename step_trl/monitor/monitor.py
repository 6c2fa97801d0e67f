"""The monitor of a trainer, which receives events and displays them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.utils import is_in_notebook

from ..rollout import Rollout
from ..steps import Segmenter, TriggerSegmenter
from .samples import ROW, CompletionSamples
from .status import RunStatus
from .terminal import TerminalView
from .trace import Trace


class Monitor:
    """
    Display a training: its status, a view in the terminal or the notebook, completions, and histograms.

    Args:
        method (`str`), headline (`Mapping[str, str]`):
            As in [`RunStatus`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        args ([`~transformers.TrainingArguments`]):
            The trainer's configuration, for `report_to` and `disable_tqdm`.
        completions (`int`):
            The number of completions to keep for trackers.
        is_main_process (`bool`):
            Whether this is the process that reports.

    Attributes:
        status ([`RunStatus`]):
            The status of the training.
        callbacks (`list[TrainerCallback]`):
            The callbacks for the trainer to add.
        replaced (`tuple[type[TrainerCallback], ...]`):
            The callbacks for the trainer to remove: transformers' progress, which only shows the loss.
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            The segmenter that defines the steps in the pictures. By default, trigger words end a step. `None` if the
            tokenizer's tokens cannot be read.
    """

    def __init__(
        self,
        method: str,
        headline: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments,
        completions: int,
        is_main_process: bool,
    ):
        self.status = RunStatus(method, headline)
        self.callbacks: list[TrainerCallback] = [self.status]
        self.replaced: tuple[type[TrainerCallback], ...] = ()
        self._tokenizer = tokenizer
        self._reports = bool(args.report_to) and is_main_process
        self._observed: defaultdict[str, list[float]] = defaultdict(list)
        self._samples = CompletionSamples(completions if args.report_to else 1)
        self._terminal: TerminalView | None = None
        if args.disable_tqdm:
            return
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressCallback

            from .notebook import NotebookView

            self.replaced = (NotebookProgressCallback,)
            self.callbacks.append(NotebookView(self.status))
        else:
            self._terminal = TerminalView(self.status)
            self.replaced = (ProgressCallback,)
            self.callbacks.append(self._terminal)

    @cached_property
    def segmenter(self) -> Segmenter | None:
        try:
            return TriggerSegmenter(self._tokenizer)  # reads the whole vocabulary
        except ValueError:
            return None

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Add values to this process's histogram `name`, which is logged with the next metrics."""
        if self._reports:
            self._observed[name].extend(values)

    def take_observations(self) -> dict[str, list[float]]:
        """Return the values that were observed since the last call."""
        taken = {name: values for name, values in self._observed.items() if values}
        self._observed.clear()
        return taken

    def note_verdicts(self, rows: Sequence[Mapping[str, Any]], correct: Sequence[bool]) -> None:
        """Store which of this process's completions are correct. `rows` are their rows of the data set."""
        self._samples.note_verdicts(rows, correct)

    def note_generation(self, output: dict[str, Any], rollouts: Sequence[Rollout] | None) -> None:
        """Store the first completions of a generation, and number all of them in `output`, which the loss reads."""
        self._samples.begin(output, rollouts)
        output[ROW] = torch.arange(len(output["completion_ids"]))
        if self._terminal is not None and self._terminal.live and self.segmenter is not None:
            self._terminal.show(self._samples.rollouts[0], self._tokenizer, self.segmenter)

    def note_loss(self, inputs: Mapping[str, Any], logps: torch.Tensor) -> None:
        """Store the inputs of the loss: its current advantages, and log-probabilities `(B, T)`."""
        if ROW in inputs and self._reports:
            self._samples.note_loss(inputs, logps)

    def traces(self, number: int) -> list[Trace]:
        """Render the first completions of the last generation, with their advantages."""
        if self.segmenter is None:
            return []
        title = f"{self.status.method}, update {self.status.update}"
        return self._samples.traces(number, self._tokenizer, self.segmenter, title)

    def close(self) -> None:
        """Release the terminal. This is also called if the training fails."""
        if self._terminal is not None:
            self._terminal.close()
