"""
Step-GRPO: dynamic truncated rollouts and a step-relative reward (arXiv 2604.16890).

Departures from GRPO:
1. Rollout: at each trigger word an answer is induced; if the model is confident in it, the thought ends there (eq. 2).
2. Steps: a completion has one semantic step more than it has trigger words (eq. 3).
3. Reward: a correct completion earns more with fewer steps than the correct ones of its group, less with more
   (eq. 4 and 5): R = alpha * acc * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * fmt.
"""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import GRPOConfig
from trl.models import unwrap_model_for_generation

from ..rewards import format_reward, step_efficiency_reward
from ..rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from ..rollout.engines import TransformersEngine
from ..steps import TriggerSegmenter
from .metrics import rollout_metrics
from .sas import StepSelection, StepSelectionMixin, check_loss_type


@dataclass
class StepGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`StepGRPOTrainer`]: these fields and those of [`~trl.GRPOConfig`].

    Args:
        triggers (`list[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            Words that open a semantic step.
        confidence_threshold (`float`, *optional*, defaults to `0.95`):
            Delta: a rollout stops when the confidence of its induced answer is strictly greater.
        answer_prompt (`str`, *optional*):
            Text that induces an answer. Without `</think>` it probes inside the open thought.
        max_probe_tokens (`int`, *optional*, defaults to `20`):
            Most tokens of an induced answer.
        max_probes (`int`, *optional*):
            Most probes per rollout. No limit by default.
        keep_trigger (`bool`, *optional*, defaults to `True`):
            Whether the trigger word stays in the path and in the probe's context.
        keep_probe_answer (`bool`, *optional*, defaults to `True`):
            Keep the confident answer; otherwise close the thought and sample an answer anew.
        require_probe_end (`bool`, *optional*, defaults to `False`):
            An induced answer that does not end within `max_probe_tokens` has confidence 0.
        skip_probe_tokens (`int`, *optional*, defaults to `0`):
            First tokens of an induced answer that do not count in its confidence.
        exit_margin (`int`, *optional*, defaults to `0`):
            Stop without a probe at a trigger with at most this many tokens of the budget left.
        speculative_probing (`bool`, *optional*, defaults to `True`):
            Let a thought go on while its probe runs. Does not change the result.
        early_rejection (`bool`, *optional*, defaults to `True`):
            Abandon a probe once it cannot reach the threshold. Does not change the result.
        accuracy_weight (`float`, *optional*, defaults to `0.9`):
            Alpha: weight of accuracy and efficiency; the format has 1 - alpha.
        step_penalty (`float`, *optional*, defaults to `0.5`):
            Beta: most that the number of steps changes the reward of a correct completion.
        step_baseline (`str`, *optional*, defaults to `"correct"`):
            Completions of the group whose mean number of steps is mu: `"correct"` or `"all"`.
        truncated_rollout (`bool`, *optional*, defaults to `True`):
            Truncate rollouts in training. Evaluation never truncates, so it shows what the model does by itself.
        step_reward (`bool`, *optional*, defaults to `True`):
            Use the efficiency term.
        format_reward (`bool`, *optional*, defaults to `True`):
            Use the format term.
        train_on_injected_tokens (`bool`, *optional*, defaults to `True`):
            Keep the tokens that were not sampled from the policy (injected text, induced answers) in the loss: this
            teaches the model to stop by itself.
        advantage_selection (`dict`, *optional*):
            Combine with step-level advantage selection: fields of [`StepSelection`], such as
            `{"selection_ratio": 0.3}`.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "advantage_selection"]

    triggers: list[str] = field(
        default=("Wait", "Alternatively"), metadata={"help": "Words that open a semantic step."}
    )
    confidence_threshold: float = field(
        default=0.95, metadata={"help": "Delta: stop when the confidence of the induced answer is greater."}
    )
    answer_prompt: str = field(
        default=ConfidenceTruncation.answer_prompt, metadata={"help": "Text that induces an answer."}
    )
    max_probe_tokens: int = field(default=20, metadata={"help": "Most tokens of an induced answer."})
    max_probes: int | None = field(default=None, metadata={"help": "Most probes per rollout."})
    keep_trigger: bool = field(default=True, metadata={"help": "Keep the trigger in the path and before the probe."})
    keep_probe_answer: bool = field(default=True, metadata={"help": "Keep a confident answer as the completion's."})
    require_probe_end: bool = field(default=False, metadata={"help": "Confidence is 0 for an answer without an end."})
    skip_probe_tokens: int = field(default=0, metadata={"help": "First answer tokens left out of the confidence."})
    exit_margin: int = field(default=0, metadata={"help": "Stop at a trigger this close to the end of the budget."})
    speculative_probing: bool = field(default=True, metadata={"help": "Let a thought go on while its probe runs."})
    early_rejection: bool = field(default=True, metadata={"help": "Abandon probes that cannot reach the threshold."})
    accuracy_weight: float = field(default=0.9, metadata={"help": "Alpha: weight of accuracy; format has 1 - alpha."})
    step_penalty: float = field(default=0.5, metadata={"help": "Beta: most that steps change a correct reward."})
    step_baseline: str = field(default="correct", metadata={"help": "Mean steps of the 'correct' or of 'all' ones."})
    truncated_rollout: bool = field(default=True, metadata={"help": "Truncate rollouts in training."})
    step_reward: bool = field(default=True, metadata={"help": "Use the efficiency term of the reward."})
    format_reward: bool = field(default=True, metadata={"help": "Use the format term of the reward."})
    train_on_injected_tokens: bool = field(default=True, metadata={"help": "Keep unsampled tokens in the loss."})
    advantage_selection: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of StepSelection, to combine with SAS."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_ranges()
        if self.truncated_rollout:
            self._check_rollout()
        if self.advantage_selection is not None:
            StepSelection(**self.advantage_selection).validate()
            check_loss_type(self)

    def _check_ranges(self) -> None:
        if isinstance(self.triggers, str) or not self.triggers or not all(self.triggers):
            raise ValueError(f"triggers: {self.triggers!r} is no list of words. Set for example ['Wait'].")
        self.triggers = tuple(self.triggers)
        for name, low, high, advice in (
            ("confidence_threshold", 0, 1, "a probability such as 0.95; 1.0 never stops a rollout"),
            ("accuracy_weight", 0, 1, "the weight alpha of accuracy such as 0.9"),
        ):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} is outside ({low}, {high}]. Set {advice}.")
        for name, least in (("step_penalty", 0), ("max_probe_tokens", 1), ("skip_probe_tokens", 0), ("exit_margin", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small. Set at least {least}.")
        if self.skip_probe_tokens >= self.max_probe_tokens:
            raise ValueError(
                f"skip_probe_tokens: {self.skip_probe_tokens} leaves no token of max_probe_tokens="
                f"{self.max_probe_tokens} to measure confidence on. Set a smaller one."
            )
        if self.max_probes is not None and self.max_probes < 1:
            raise ValueError(f"max_probes: {self.max_probes} allows no probe. Set truncated_rollout=False instead.")
        if self.step_baseline not in ("correct", "all"):
            raise ValueError(f"step_baseline: {self.step_baseline!r} is not known. Set 'correct' or 'all'.")

    def _check_rollout(self) -> None:
        """Options of the parent that a truncated rollout would ignore."""
        for name, neutral in (("repetition_penalty", 1.0), ("generation_kwargs", None), ("use_vllm", False)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not supported by the truncated rollout. Leave it at "
                    f"{neutral!r}, or set truncated_rollout=False."
                )


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
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.

    Example:

    ```python
    from step_trl import StepGRPOConfig, StepGRPOTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = StepGRPOTrainer(
        load_model(),
        args=StepGRPOConfig("step-grpo", max_completion_length=400),
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
                author       = {Chen and others},
                year         = 2026,
                eprint       = {arXiv:2604.16890},
            }
            """),
    }
    config_class = StepGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, **kwargs):
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if self.args.truncated_rollout and isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "processing_class: truncated rollouts are for text models, this one has a multimodal processor. Set "
                "truncated_rollout=False."
            )
        selection = self.args.advantage_selection
        self._enable_step_selection(None if selection is None else StepSelection(**selection))
        self._segmenter = TriggerSegmenter(self._tokenizer, self.args.triggers)
        self._engine: TransformersEngine | None = None
        self._add_reward_columns()

    def _add_reward_columns(self) -> None:
        """Eq. 5 as TRL columns: alpha * accuracy, alpha * efficiency, (1 - alpha) * format, and the user's further ones."""
        alpha, columns = self.args.accuracy_weight, []
        self.reward_weights[0] *= alpha
        if self.args.step_reward:
            columns.append(("step_efficiency", _filled_in_after_the_gather, alpha))
        if self.args.format_reward:
            columns.append(("format_reward", format_reward, 1 - alpha))
        for name, reward_func, weight in columns:
            self.reward_func_names.append(name)
            self.reward_funcs.append(reward_func)
            self.reward_processing_classes.append(None)
            self.reward_weights = torch.cat([self.reward_weights, self.reward_weights.new_tensor([weight])])

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not (self.args.truncated_rollout and self.model.training):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()  # of the generator that `seed` governs
        with self._generating_engine() as engine:
            rollouts = DynamicTruncatedRollout(
                engine,
                self._tokenizer,
                self._truncation(),
                SamplingParams(
                    self.max_completion_length, self.temperature, self.top_p, self.top_k or 0, self.min_p or 0.0
                ),
                self.args.speculative_probing,
            ).run(prompt_ids, seeds)
        for name, values in rollout_metrics(rollouts, self.args.confidence_threshold).items():
            for value in values:
                self._log_metric(f"step_grpo/{name}", value)
        return [r.completion_ids for r in rollouts], [r.logprobs for r in rollouts]

    def _truncation(self) -> ConfidenceTruncation:
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
    def _generating_engine(self):
        """The in-process engine on the unwrapped policy; its cache does not outlive the weights."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            if self._engine is None:
                self._engine = TransformersEngine(model, self._tokenizer)
            try:
                yield self._engine
            finally:
                self._engine.drop_prefix_cache()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        local_steps = [1 + self._segmenter.count(ids) for ids in completion_ids_list]  # eq. 3
        num_steps = self.accelerator.gather(torch.tensor(local_steps, device=rewards_per_func.device))
        mode = "train" if self.model.training else "eval"
        if self.args.step_reward:
            column = self.reward_func_names.index("step_efficiency")
            rewards_per_func[:, column] = step_efficiency_reward(
                num_steps,
                self._correct,
                self.num_generations if mode == "train" else self.num_generations_eval,
                self.args.step_penalty,
                self.args.step_baseline,
            )
        self._metrics[mode]["step_grpo/steps/mean"].append(num_steps.float().mean().item())
        self._metrics[mode]["step_grpo/steps/correct_mean"].append(num_steps[self._correct].float().mean().item())
        self._log_completion_extra("steps", local_steps)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.args.train_on_injected_tokens or "sampling_per_token_logps" not in output:
            return output
        sampled = ~output["sampling_per_token_logps"].isnan()  # (B, T)
        output["tool_mask"] = sampled * output.get("tool_mask", 1)
        loss_mask = output["completion_mask"] * output["tool_mask"]
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask.sum()).sum()
        return output


def _filled_in_after_the_gather(completions, **kwargs) -> list[float]:
    """Placeholder of a column that is relative to a group: a process may see only a part of one."""
    return [0.0] * len(completions)
