"""
Step-GRPO: dynamic truncated rollouts and a step-relative reward (arXiv 2604.16890).

Departures from GRPO:
1. Rollout: at each trigger word an answer is induced; if the model is confident in it, the thought ends there (eq. 2).
2. Steps: a completion has one semantic step more than it has trigger words (eq. 3).
3. Reward: a correct completion earns more with fewer steps than the correct ones of its group, less with more
   (eq. 4 and 5): R = alpha * acc * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * fmt.
"""

from __future__ import annotations

import logging
import textwrap
from typing import cast

import torch

from ..rewards import format_reward, step_efficiency_reward
from ..rewards.step_efficiency import Baseline
from ..steps import TriggerSegmenter
from .sas import StepSelectionMixin
from .step_grpo_config import StepGRPOConfig
from .truncated import TruncatedRolloutMixin


logger = logging.getLogger(__name__)


class StepGRPOTrainer(TruncatedRolloutMixin, StepSelectionMixin):
    """
    Trainer for Step-GRPO.

    Step-GRPO (arXiv 2604.16890) teaches a reasoning model to stop when it knows the answer: rollouts are truncated
    where an induced answer is confident, and correct completions are rewarded by their number of semantic steps
    relative to the correct ones of their group. Changes with respect to [`~trl.GRPOTrainer`]: how training completions
    are generated, and two more reward columns, `step_efficiency` and `format_reward`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Math accuracy by default. Otherwise the first one is the correctness signal (correct when more than 0.5),
            weighted by alpha; further ones are added with their `reward_weights`.
        args ([`StepGRPOConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and, for the default reward, `solution`.
        eval_dataset, processing_class (*optional*):
            As in [`~trl.GRPOTrainer`].
        truncation_callbacks (`Sequence[TruncationCallback]`, *optional*):
            Decide where rollouts stop in training. By default a [`ConfidenceTruncation`] with the options of `args`.
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            What a step is, in place of `triggers`; its matches count as those of trigger words do.
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes. A `rollout_func` replaces the truncated rollout.

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
    args: StepGRPOConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        truncation_callbacks=None,
        segmenter=None,
        **kwargs,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self._enable_step_selection(self.args.step_selection())
        self._segmenter = TriggerSegmenter(self._tokenizer, self.args.triggers) if segmenter is None else segmenter
        self._check_who_samples(truncation_callbacks)
        self._truncates = self.args.truncated_rollout and self.rollout_func is None
        if self._truncates:
            self._enable_truncated_rollouts(truncation_callbacks)
        self._add_reward_columns()

    def _check_who_samples(self, truncation_callbacks) -> None:
        """Say which options of the truncated rollout have no effect."""
        args = self.args
        if truncation_callbacks is not None and not args.truncated_rollout:
            raise ValueError(
                "truncation_callbacks: truncated_rollout=False asks none of them. Set truncated_rollout=True, or give "
                "no callbacks."
            )
        if self.rollout_func is None:
            return
        for name, ignored in (
            ("truncation_callbacks", truncation_callbacks is not None),
            ("serial_group", args.serial_group),
        ):
            if ignored:
                raise ValueError(
                    f"rollout_func: it samples the completions, so that {name} would have no effect. Give one of the "
                    "two."
                )
        if args.truncated_rollout:
            logger.warning(
                "rollout_func: it samples the completions, in place of the truncated rollout. Set "
                "truncated_rollout=False, or run a step_trl.rollout.DynamicTruncatedRollout in your function."
            )

    def _add_reward_columns(self) -> None:
        """
        Eq. 5 as TRL columns: alpha * accuracy, alpha * efficiency, (1 - alpha) * format; further ones stay. Without
        any part of Step-GRPO this is GRPO, and accuracy keeps its weight.
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

    def _shown_steps(self):
        return self._segmenter if self.step_selection is None else self._step_segmenter

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not (self._truncates and self.model.training):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        rollouts = self._truncated_rollouts(prompt_ids, num_generations)
        return [rollout.completion_ids for rollout in rollouts], [rollout.logprobs.tolist() for rollout in rollouts]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        local_steps = [1 + self._segmenter.count(ids) for ids in completion_ids_list]  # eq. 3
        num_steps = self.accelerator.gather(torch.tensor(local_steps, device=rewards_per_func.device))
        if self.args.step_reward:
            baseline = cast("Baseline", self.args.step_baseline)
            terms = step_efficiency_reward(
                num_steps, self._correct, self._group_size, self.args.step_penalty, baseline
            )
            self._fill_reward_column(rewards_per_func, "step_efficiency", terms)
        if self.args.format_reward:
            formatted = torch.tensor(format_reward(completions), device=rewards_per_func.device)
            self._fill_reward_column(rewards_per_func, "format_reward", self.accelerator.gather(formatted))
        self._log_steps(local_steps, num_steps)
        return rewards_per_func

    def _log_steps(self, local_steps: list[int], num_steps: torch.Tensor) -> None:
        metrics = self._metrics[self._mode]
        metrics["step_grpo/steps/mean"].append(num_steps.float().mean().item())
        if self._correct.any():
            metrics["step_grpo/steps/correct_mean"].append(num_steps[self._correct].float().mean().item())
        self._log_completion_extra("steps", local_steps)
        if self.model.training:
            self.observe("step_grpo/steps/histogram", num_steps.tolist())
