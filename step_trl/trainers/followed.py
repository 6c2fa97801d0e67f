"""A trainer that can be watched: in a terminal, a notebook, and experiment trackers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.utils import is_in_notebook
from trl import GRPOTrainer

from ..monitor import RunStatus, TerminalView, TrackerCallback
from ..monitor.samples import ROW, CompletionSamples
from ..report.trace import Trace
from ..rollout import Rollout
from ..steps import Segmenter, TriggerSegmenter
from .base_config import EfficientReasoningConfig


class FollowedTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose progress shows what matters, and whose completions, their traces and histograms are in
    the trackers that `report_to` names.

    Attributes:
        status ([`~step_trl.monitor.RunStatus`]):
            What it is doing.
    """

    args: EfficientReasoningConfig
    model: PreTrainedModel
    _tokenizer: PreTrainedTokenizerBase
    _own_rollouts: Sequence[Rollout] | None = None  # of the generation under way, where it is not TRL's

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.status = RunStatus(self._name, self._headline())
        self._observed: defaultdict[str, list[float]] = defaultdict(list)
        self._samples = CompletionSamples(self.args.num_completions_to_log if self.args.report_to else 1)
        self._terminal: TerminalView | None = None
        self.add_callback(self.status)
        if not self.args.disable_tqdm:
            self._add_view()
        self.add_callback(TrackerCallback(self))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._terminal is not None:
                self._terminal.close()

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Add to the histogram `name` of this process, which is logged with the next numbers."""
        if self.args.report_to and self.accelerator.is_main_process:
            self._observed[name].extend(values)

    def take_observations(self) -> dict[str, list[float]]:
        """What was observed since the last call."""
        taken = {name: values for name, values in self._observed.items() if values}
        self._observed.clear()
        return taken

    def completion_traces(self, number: int) -> list[Trace]:
        """Pictures of the first completions of the last generation, with their advantages."""
        segmenter = self._shown_steps()
        if segmenter is None:
            return []
        title = f"{self._name}, update {self.state.global_step}"
        return self._samples.traces(number, self._tokenizer, segmenter, title)

    def _headline(self) -> dict[str, str]:
        """Label to key of the metrics that matter first."""
        return {
            "reward": "reward",
            "accuracy": f"rewards/{self.reward_func_names[0]}/mean",
            "tokens": "completions/mean_length",
        }

    def _shown_steps(self) -> Segmenter | None:
        """What a step is, for those who look on; `None` for a tokenizer whose tokens cannot be read."""
        return self._default_steps

    @cached_property
    def _default_steps(self) -> Segmenter | None:
        try:
            return TriggerSegmenter(self._tokenizer)  # reads the whole vocabulary
        except ValueError:
            return None

    def _add_view(self) -> None:
        """In place of transformers' progress, which shows the loss only."""
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressCallback

            from ..monitor.notebook import NotebookView

            self.remove_callback(NotebookProgressCallback)
            self.add_callback(NotebookView(self.status))
        else:
            self._terminal = TerminalView(self.status)
            self.remove_callback(ProgressCallback)
            self.add_callback(self._terminal)

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        self.status.enter("rollouts" if training else "evaluation")
        self._own_rollouts = None
        output = super()._generate_and_score_completions(inputs)
        if training:
            self._samples.begin(output, self._own_rollouts)
            output[ROW] = torch.arange(len(output["completion_ids"]))
            if self._terminal is not None and self._terminal.live and (segmenter := self._shown_steps()) is not None:
                self._terminal.show(self._samples.rollouts[0], self._tokenizer, segmenter)
            self.status.enter("update")
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.model.training:
            self.status.enter("rewards")
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _follow_rewards(self, inputs: Sequence[Mapping[str, Any]], correct: list[bool]) -> None:
        """To be told which of this process's completions are correct; `inputs` are their rows of the data set."""
        columns: dict[str, list[Any]] = {"correct": correct}
        if any(row.get("solution") is not None for row in inputs):
            columns["solution"] = [row.get("solution") for row in inputs]
        for name, values in columns.items():
            if name not in self._pending_extra_logs:  # a reward function may have a column of this name
                self._log_completion_extra(name, values)
        if self.model.training:
            self._samples.note_verdicts(inputs, correct)

    def _follow_loss(self, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """To be told what the loss reads, advantages as they are now and log-probabilities `(B, T)`."""
        if ROW in inputs and self.args.report_to and self.accelerator.is_main_process:
            self._samples.note_loss(inputs, logps)
