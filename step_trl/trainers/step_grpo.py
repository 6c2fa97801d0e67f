"""
Step-GRPO: dynamic truncated rollouts and a step-relative reward (arXiv 2604.16890).

Departures from GRPO:
1. Rollout: at each trigger word an answer is induced; if the model is confident in it, the thought ends there (eq. 2).
2. Steps: a completion has one semantic step more than it has trigger words (eq. 3).
3. Reward: a correct completion earns more if it has fewer steps than the mean of its group's correct ones, and less if
   it has more (eq. 4 and 5): R = alpha * acc * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * fmt.
"""

from __future__ import annotations

import logging
import math
import textwrap
from typing import ClassVar, cast

import torch

from ..rewards import format_reward, step_efficiency_reward
from ..rewards.step_efficiency import Baseline
from ..rollout import ConfidenceTruncation, Rollout, TruncationCallback
from ..rollout.metrics import rollout_metrics
from ..runtime.signal_warnings import Symptom
from ..steps import TriggerSegmenter
from .base import EfficientReasoningTrainer
from .batch import Batch
from .sas import StepSelector
from .step_grpo_config import StepGRPOConfig


logger = logging.getLogger(__name__)


class StepGRPOTrainer(EfficientReasoningTrainer):
    """
    Trainer for Step-GRPO.

    Step-GRPO (arXiv 2604.16890) teaches a reasoning model to stop when it knows the answer: rollouts are truncated
    where an induced answer is confident, and correct completions are rewarded by their number of semantic steps
    relative to the correct ones of their group. Changes with respect to [`~trl.GRPOTrainer`]: how training completions
    are generated, and two more reward columns, `step_efficiency` and `format_reward`.

    Args:
        model, reward_funcs, args, train_dataset, **kwargs:
            As in [`EfficientReasoningTrainer`], with `args` a [`StepGRPOConfig`]. Its `accuracy_weight` multiplies the
            weight of the correctness signal. A `rollout_func` replaces the truncated rollout.
        truncation_callbacks (`Sequence[TruncationCallback]`, *optional*):
            The callbacks that decide where rollouts stop in training. By default, a [`ConfidenceTruncation`] with the
            options of `args`.
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            The segmenter that defines the steps, instead of `triggers`. Its matches count as trigger words do.

    Example:

    ```python
    from step_trl import StepGRPOConfig, StepGRPOTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = StepGRPOTrainer(
        load_model(),
        args=StepGRPOConfig("step-grpo", max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "step-grpo"]
    _name = "Step-GRPO"
    _paper = {
        "title": "Step-GRPO: Internalizing Dynamic Early Exit for Efficient Reasoning",
        "id": "2604.16890",
        "citation": textwrap.dedent("""\
            @article{chen2026stepgrpo,
                title        = {{Step-GRPO: Internalizing Dynamic Early Exit for Efficient Reasoning}},
                author       = {Chen, Benteng and Wang, Weida and Zhang, Shufei and Lin, Mingbao and Zhang, Min},
                year         = 2026,
                eprint       = {arXiv:2604.16890},
            }
            """),
    }
    config_class = StepGRPOConfig
    metric_prefixes = ("step_grpo", "sas")
    charts: ClassVar = {
        "Efficient reasoning": {
            "steps per completion": ["step_grpo/steps/mean", "step_grpo/steps/correct_mean"],
            "early exits": ["step_grpo/exit_rate"],
            "confidence of probes": ["step_grpo/confidence/mean"],
        },
    }
    symptoms = (
        Symptom(
            "step_grpo/steps/mean",
            lambda value: value <= 1.0,
            "No trigger word was found in any completion, so there are no steps to shorten. Set triggers to words "
            "with which this model opens a new line of thought.",
            only_from_start=True,  # a model may well learn to do without triggers
        ),
    )
    args: StepGRPOConfig
    truncation_callbacks: list[TruncationCallback]
    _samples_with_images = True

    def __init__(self, model, *args, truncation_callbacks=None, segmenter=None, **kwargs):
        super().__init__(model, *args, **kwargs)
        self._check_who_samples(truncation_callbacks)
        self._truncates = self.args.truncated_rollout and self.rollout_func is None
        if self._truncates:
            self._policy_engine.check_own_rollouts(with_images=self._samples_with_images)
            self.truncation_callbacks = (
                [ConfidenceTruncation(self._tokenizer, **self.args.probe_options())]
                if truncation_callbacks is None
                else list(truncation_callbacks)
            )
        self._segmenter = TriggerSegmenter(self._tokenizer, self.args.triggers) if segmenter is None else segmenter
        self.monitor.segmenter = self._segmenter
        # Of this process's rollouts since the last rewards: tokens and number of natural and of truncated ones.
        self._length_totals = torch.zeros(2, 2)
        self.step_selector: StepSelector | None = None
        if (selection := self.args.step_selection()) is not None:
            self.step_selector = StepSelector(selection, self._tokenizer)
            self.monitor.segmenter = self.step_selector.segmenter
        self._add_reward_columns()

    def _check_who_samples(self, truncation_callbacks) -> None:
        """Refuse options of the truncated rollout that would have no effect."""
        args = self.args
        if truncation_callbacks is not None and not args.truncated_rollout:
            raise ValueError(
                "truncation_callbacks: truncated_rollout=False does not call them. Set truncated_rollout=True, or "
                "give no callbacks."
            )
        if self.rollout_func is None:
            return
        if truncation_callbacks is not None:
            raise ValueError(
                "rollout_func: it samples the completions, so that truncation_callbacks would have no effect. Give "
                "one of the two."
            )
        if args.truncated_rollout:
            logger.warning(
                "rollout_func: it samples the completions, instead of the truncated rollout. Set "
                "truncated_rollout=False, or run a step_trl.rollout.DynamicTruncatedRollout in your function."
            )

    def _add_reward_columns(self) -> None:
        """
        Add eq. 5 as TRL columns: alpha * accuracy, alpha * efficiency, (1 - alpha) * format. Further columns stay as
        they are. Without any part of Step-GRPO, this is GRPO, and accuracy keeps its weight.
        """
        args = self.args
        alpha = args.accuracy_weight
        if args.truncated_rollout or args.step_reward or args.format_reward:
            self.reward_weights[: self._correctness_columns] *= alpha
        if args.step_reward:
            self._add_reward_column("step_efficiency", alpha)
        if args.format_reward:
            self._add_reward_column("format_reward", 1 - alpha)

    def _headline(self):
        return super()._headline() | {"steps": "step_grpo/steps/mean", "exits": "step_grpo/exit_rate"}

    def sample(self, batch):
        if not self._truncates:
            return None
        seeds = self.seeds(len(batch.prompt_ids))
        rollouts = self.run_rollouts(batch.prompt_ids, seeds=seeds, **self.rollout_options())
        self._log_rollouts(rollouts)
        return rollouts

    def rollout_options(self):
        if not self._truncates:
            return {}
        return {"callbacks": self.truncation_callbacks, "speculative": self.args.speculative_probing}

    def reward_columns(self, batch):
        columns = super().reward_columns(batch)
        local_steps = [1 + self._segmenter.count(ids) for ids in batch.completion_ids]  # eq. 3
        num_steps = batch.gather(local_steps)
        if self.args.step_reward:
            baseline = cast("Baseline", self.args.step_baseline)
            columns["step_efficiency"] = step_efficiency_reward(
                num_steps, batch.correct, batch.num_generations, self.args.step_penalty, baseline
            )
        if self.args.format_reward:
            columns["format_reward"] = batch.gather(format_reward(batch.completions))
        self._log_steps(local_steps, num_steps)
        self._log_lengths(batch)
        return columns

    def credit(self, batch, advantages):
        if self.step_selector is not None:
            self.step_selector.mark(batch)
        if not self.args.train_on_injected_tokens and "sampling_per_token_logps" in batch.inputs:
            batch.exclude(batch.inputs["sampling_per_token_logps"].isnan())
        return advantages

    def before_loss(self, inputs, logps):
        if self.step_selector is not None:
            self.step_selector.select(self, inputs, logps)

    def _log_rollouts(self, rollouts: list[Rollout]) -> None:
        metrics = rollout_metrics(rollouts, self.args.confidence_threshold)
        for name, values in metrics.items():
            for value in values:
                self._log_metric(f"step_grpo/{name}", value)
        self.monitor.observe("step_grpo/confidence/histogram", metrics["confidence/mean"])
        for rollout in rollouts:
            self._length_totals[int(rollout.truncated)] += torch.tensor([float(len(rollout.completion_ids)), 1.0])

    def _log_steps(self, local_steps: list[int], num_steps: torch.Tensor) -> None:
        metrics, correct = self._metrics[self._mode], self.batch.correct
        metrics["step_grpo/steps/mean"].append(num_steps.float().mean().item())
        if correct.any():
            metrics["step_grpo/steps/correct_mean"].append(num_steps[correct].float().mean().item())
        self._log_completion_extra("steps", local_steps)
        if self.model.training:
            self.monitor.observe("step_grpo/steps/histogram", num_steps.tolist())

    def _log_lengths(self, batch: Batch) -> None:
        """Log what early exits saved, and which completions had one."""
        if self._truncates and batch.training:
            totals = self.accelerator.reduce(self._length_totals.to(self.accelerator.device), reduction="sum")
            natural, truncated = (totals[:, 0] / totals[:, 1]).tolist()
            if not math.isnan(saved := natural - truncated):
                self._metrics["train"]["step_grpo/tokens_saved"].append(saved)
            self._length_totals = torch.zeros(2, 2)
        if batch.rollouts is not None:
            self._log_completion_extra("exit", [rollout.truncated for rollout in batch.rollouts])
            self._log_completion_extra("probes", [len(rollout.probes) for rollout in batch.rollouts])
