"""Rollouts that are ended early, within a training: which engine samples them, and what the loss does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from transformers import ProcessorMixin
from trl.models import unwrap_model_for_generation

from ..rollout import (
    ConfidenceTruncation,
    DynamicTruncatedRollout,
    Rollout,
    SamplingParams,
    SerialGroupRollout,
    TruncationCallback,
)
from ..rollout.engines import Engine, TransformersEngine, VLLMColocatedEngine
from ..rollout.metrics import length_totals, rollout_metrics, tokens_saved
from ..runtime.ranks import failing_together, rollout_seeds
from ..runtime.sharding import check_rollouts_in_process
from .efficient import EfficientReasoningTrainer
from .step_grpo_config import StepGRPOConfig


class TruncatedRolloutMixin(EfficientReasoningTrainer):
    """For trainers that sample completions by [`~step_trl.rollout.DynamicTruncatedRollout`]."""

    args: StepGRPOConfig
    truncation_callbacks: list[TruncationCallback]
    _truncates: bool  # where nobody else samples the completions

    def _enable_truncated_rollouts(self, truncation_callbacks: Sequence[TruncationCallback] | None) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "processing_class: truncated rollouts are for text models, this one has a multimodal processor. Set "
                "truncated_rollout=False."
            )
        if not self.use_vllm:
            check_rollouts_in_process(
                self._dist.zero_stage, self._dist.fsdp_version, self.args.ds3_gather_for_generation
            )
        self.truncation_callbacks = (
            [self._confidence_truncation()] if truncation_callbacks is None else list(truncation_callbacks)
        )
        self._engine: TransformersEngine | None = None
        self._colocated_engine: VLLMColocatedEngine | None = None
        if self.use_vllm and self._server_engine is None:
            self._colocated_engine = VLLMColocatedEngine(self.vllm_generation.llm, self._tokenizer)
        self._seeded_step, self._seeded_calls = -1, 0
        self._length_totals = torch.zeros(2, 2)  # of this process's rollouts since the last rewards

    def _confidence_truncation(self) -> ConfidenceTruncation:
        args = self.args
        return ConfidenceTruncation(
            self._tokenizer,
            triggers=args.triggers,
            threshold=args.confidence_threshold,
            answer_prompt=args.answer_prompt,
            max_probe_tokens=args.max_probe_tokens,
            max_probes=args.max_probes,
            keep_trigger=args.keep_trigger,
            keep_probe_answer=args.keep_probe_answer,
            require_probe_end=args.require_probe_end,
            skip_probe_tokens=args.skip_probe_tokens,
            exit_margin=args.exit_margin,
            early_rejection=args.early_rejection,
        )

    def _truncated_rollouts(self, prompt_ids: list[list[int]], num_generations: int) -> list[Rollout]:
        """One rollout for each of the prompts, of which `num_generations` in a row are equal."""
        args = self.args
        sampling = SamplingParams(
            cast("int", self.max_completion_length), self.temperature, self.top_p, self.top_k or 0, self.min_p or 0.0
        )
        seeded = not self.use_vllm if args.seeded_rollouts is None else args.seeded_rollouts
        seeds = self._rollout_seeds(len(prompt_ids)) if seeded else None
        most = args.max_rollouts_in_flight
        # With tools, processes call this in different numbers, and cannot wait for each other.
        with nullcontext() if self.tools else failing_together(), self._generating_engine() as engine:
            if args.serial_group:
                serial = SerialGroupRollout(engine, sampling, max_in_flight=most)
                rollouts = serial.run(prompt_ids, num_generations, seeds)
            else:
                # TRL gives a colocated model one slot per rollout: a probe beside a thought would wait for another.
                speculative = args.speculative_probing and self._colocated_engine is None
                rollout = DynamicTruncatedRollout(
                    engine, self.truncation_callbacks, sampling, speculative, max_in_flight=most
                )
                with self.status.following(rollout, len(prompt_ids)) as note:
                    rollouts = rollout.run(prompt_ids, seeds, note)
        self._note_rollouts(rollouts)
        return rollouts

    def _rollout_seeds(self, count: int) -> list[int]:
        """For the next call of this update: those of this process's part of the batch over all processes."""
        step = self.state.global_step
        self._seeded_calls = self._seeded_calls + 1 if step == self._seeded_step else 0
        self._seeded_step = step
        first = self.accelerator.process_index * count
        return rollout_seeds([self.args.seed, step, self._seeded_calls], first, count)

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

    def _note_rollouts(self, rollouts: list[Rollout]) -> None:
        for name, values in rollout_metrics(rollouts, self.args.confidence_threshold).items():
            for value in values:
                self._log_metric(f"step_grpo/{name}", value)
        confidences = [probe.confidence for rollout in rollouts for probe in rollout.probes]
        self.observe("step_grpo/confidence/histogram", [value for value in confidences if value is not None])
        self._length_totals += length_totals(rollouts)
        self._own_rollouts = None if self.tools else rollouts

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._truncates and self.model.training:
            totals = self.accelerator.reduce(self._length_totals.to(rewards_per_func.device), reduction="sum")
            if not math.isnan(saved := tokens_saved(totals)):
                self._metrics["train"]["step_grpo/tokens_saved"].append(saved)
            self._length_totals = torch.zeros(2, 2)
        if self._own_rollouts is not None:
            self._log_completion_extra("exit", [rollout.truncated for rollout in self._own_rollouts])
            self._log_completion_extra("probes", [len(rollout.probes) for rollout in self._own_rollouts])
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
