"""
Step-GRPO: dynamic truncated rollouts and a step-relative reward (arXiv 2604.16890).

Departures from GRPO:
1. Rollout: at each trigger word an answer is induced; if the model is confident in it, the thought ends there (eq. 2).
2. Steps: a completion has one semantic step more than it has trigger words (eq. 3).
3. Reward: a correct completion earns more with fewer steps than the correct ones of its group, less with more
   (eq. 4 and 5): R = alpha * acc * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * fmt.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from transformers import ProcessorMixin
from trl.models import unwrap_model_for_generation

from ..rewards import format_reward, step_efficiency_reward
from ..rewards.efficiency import Baseline
from ..rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams, SerialGroupRollout
from ..rollout.engines import Engine, TransformersEngine, VLLMColocatedEngine
from ..rollout.ranks import failing_together, rollout_seeds
from ..steps import TriggerSegmenter
from .base import filled_in_after_the_gather
from .metrics import length_totals, rollout_metrics, tokens_saved
from .sas import StepSelectionMixin
from .sharding import check_rollouts_in_process
from .step_grpo_config import StepGRPOConfig


class StepGRPOTrainer(StepSelectionMixin):
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
        truncation_callbacks (`Sequence[TruncationCallback]`, *optional*):
            Decide where rollouts stop in training. By default a [`ConfidenceTruncation`] with the options of `args`.
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            What a step is, in place of `triggers`; its matches count as those of trigger words do.
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.

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
        *,
        truncation_callbacks=None,
        segmenter=None,
        **kwargs,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if self.args.truncated_rollout and isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "processing_class: truncated rollouts are for text models, this one has a multimodal processor. Set "
                "truncated_rollout=False."
            )
        if self.args.truncated_rollout and not self.use_vllm:
            check_rollouts_in_process(
                self._dist.zero_stage, self._dist.fsdp_version, self.args.ds3_gather_for_generation
            )
        self._enable_step_selection(self.args.step_selection())
        self._segmenter = TriggerSegmenter(self._tokenizer, self.args.triggers) if segmenter is None else segmenter
        self._engine: TransformersEngine | None = None
        self._colocated_engine: VLLMColocatedEngine | None = None
        if self.args.truncated_rollout and self.use_vllm and self._server_engine is None:
            self._colocated_engine = VLLMColocatedEngine(self.vllm_generation.llm, self._tokenizer)
        self._seeded_step, self._seeded_calls = -1, 0
        self._length_totals = torch.zeros(2, 2)  # of this process's truncated rollouts since the last rewards
        self.truncation_callbacks = (
            [self._confidence_truncation()] if truncation_callbacks is None else list(truncation_callbacks)
        )
        self._add_reward_columns()

    def _add_reward_columns(self) -> None:
        """Eq. 5 as TRL columns: alpha * accuracy, alpha * efficiency, (1 - alpha) * format; further ones stay."""
        alpha = self.args.accuracy_weight
        self.reward_weights[0] *= alpha
        if self.args.step_reward:
            self._add_reward_column("step_efficiency", filled_in_after_the_gather, alpha)
        if self.args.format_reward:
            self._add_reward_column("format_reward", format_reward, 1 - alpha)

    def _headline(self):
        return super()._headline() | {"steps": "step_grpo/steps/mean", "exits": "step_grpo/exit_rate"}

    def _shown_steps(self):
        return self._segmenter if self.step_selection is None else self._step_segmenter

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not (self.args.truncated_rollout and self.model.training):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        seeded = not self.use_vllm if self.args.seeded_rollouts is None else self.args.seeded_rollouts
        # With tools, processes call this in different numbers, and cannot wait for each other.
        with nullcontext() if self.tools else failing_together(), self._generating_engine() as engine:
            sampling = SamplingParams(
                cast("int", self.max_completion_length),
                self.temperature,
                self.top_p,
                self.top_k or 0,
                self.min_p or 0.0,
            )
            seeds = self._rollout_seeds(len(prompt_ids)) if seeded else None
            most = self.args.max_rollouts_in_flight
            if self.args.serial_group:
                rollouts = SerialGroupRollout(engine, sampling, max_in_flight=most).run(
                    prompt_ids, num_generations, seeds
                )
            else:
                # TRL gives a colocated model one slot per rollout: a probe beside a thought would wait for another.
                speculative = self.args.speculative_probing and self._colocated_engine is None
                rollout = DynamicTruncatedRollout(
                    engine, self.truncation_callbacks, sampling, speculative, max_in_flight=most
                )
                with self.status.following(rollout, len(prompt_ids)) as note:
                    rollouts = rollout.run(prompt_ids, seeds, note)
        for name, values in rollout_metrics(rollouts, self.args.confidence_threshold).items():
            for value in values:
                self._log_metric(f"step_grpo/{name}", value)
        self._own_rollouts = None if self.tools else rollouts
        confidences = [probe.confidence for rollout in rollouts for probe in rollout.probes]
        self.observe("step_grpo/confidence/histogram", [value for value in confidences if value is not None])
        self._length_totals += length_totals(rollouts)
        return [r.completion_ids for r in rollouts], [r.logprobs.tolist() for r in rollouts]

    def _rollout_seeds(self, count: int) -> list[int]:
        """For the next call of this update: those of this process's part of the batch over all processes."""
        step = self.state.global_step
        self._seeded_calls = self._seeded_calls + 1 if step == self._seeded_step else 0
        self._seeded_step = step
        first = self.accelerator.process_index * count
        return rollout_seeds([self.args.seed, step, self._seeded_calls], first, count)

    def _confidence_truncation(self) -> ConfidenceTruncation:
        args = self.args
        return ConfidenceTruncation(
            self._tokenizer,
            args.triggers,
            args.confidence_threshold,
            args.answer_prompt,
            args.max_probe_tokens,
            args.max_probes,
            args.keep_trigger,
            args.keep_probe_answer,
            args.require_probe_end,
            args.skip_probe_tokens,
            args.exit_margin,
            args.early_rejection,
        )

    @contextmanager
    def _generating_engine(self) -> Iterator[Engine]:
        """vLLM with the policy's weights, or the in-process engine on the unwrapped policy."""
        vllm_engine = self._server_engine or self._colocated_engine
        if vllm_engine is not None:
            self._sync_weights()
            yield vllm_engine
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=cast("dict | None", self.args.gradient_checkpointing_kwargs),
            ) as model,
            self._whole_parameters(),
        ):
            if self._engine is None:
                self._engine = TransformersEngine(model, self._tokenizer)
            try:
                yield self._engine
            finally:
                self._engine.drop_prefix_cache()  # the weights are about to change

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        local_steps = [1 + self._segmenter.count(ids) for ids in completion_ids_list]  # eq. 3
        num_steps = self.accelerator.gather(torch.tensor(local_steps, device=rewards_per_func.device))
        metrics = self._metrics[self._mode]
        if self.args.step_reward:
            column = self.reward_func_names.index("step_efficiency")
            rewards_per_func[:, column] = step_efficiency_reward(
                num_steps,
                self._correct,
                self._group_size,
                self.args.step_penalty,
                cast("Baseline", self.args.step_baseline),
            )
        metrics["step_grpo/steps/mean"].append(num_steps.float().mean().item())
        if self._correct.any():
            metrics["step_grpo/steps/correct_mean"].append(num_steps[self._correct].float().mean().item())
        if self.args.truncated_rollout and self.model.training:
            totals = self.accelerator.reduce(self._length_totals.to(num_steps.device), reduction="sum")
            if not math.isnan(saved := tokens_saved(totals)):
                metrics["step_grpo/tokens_saved"].append(saved)
            self._length_totals = torch.zeros(2, 2)
        self._log_completion_extra("steps", local_steps)
        if self._own_rollouts is not None:
            self._log_completion_extra("exit", [rollout.truncated for rollout in self._own_rollouts])
            self._log_completion_extra("probes", [len(rollout.probes) for rollout in self._own_rollouts])
        if self.model.training:
            self.observe("step_grpo/steps/histogram", num_steps.tolist())
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if "sampling_per_token_logps" not in output:
            return output
        sampled = ~output["sampling_per_token_logps"].isnan()  # (B, T)
        if "step_ids" in output:
            # Injected tokens make no step unsure, and keep the advantage that teaches the model to stop.
            output["step_ids"] = output["step_ids"].masked_fill(~sampled, -1)
        if not self.args.train_on_injected_tokens:
            output["tool_mask"] = sampled * output.get("tool_mask", 1)
            loss_mask = output["completion_mask"] * output["tool_mask"]
            output["num_items_in_batch"] = self.accelerator.gather(loss_mask.sum()).sum()
        return output

    def _refine_loss_inputs(self, inputs, logps):
        super()._refine_loss_inputs(inputs, logps)
        if "sampling_per_token_logps" in inputs and "ref_per_token_logps" in inputs:
            # The KL term is an estimate over tokens that the policy sampled. Elsewhere it would be exp(15) where the
            # policy has unlearnt an injected token that the reference expects.
            sampled = ~inputs["sampling_per_token_logps"].isnan()
            inputs["ref_per_token_logps"] = torch.where(sampled, inputs["ref_per_token_logps"], logps)
