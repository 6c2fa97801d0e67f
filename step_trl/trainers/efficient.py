"""
GRPO with a length reward: the baselines that are a reward.

Departures from GRPO:
1. One more column of rewards, computed over the global batch, see `rewards/`.
2. LAPO (arXiv 2507.15758) remembers how long solutions are; its second stage states that in the thought's opening.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import get_config_model_id

from ..rewards.length_rewards import TARGETS_IN_ROWS, length_term
from ..token_targets import TARGET_COLUMN, validate_targets
from .base import BaseTrainer
from .lapo import FILE as LAPO_FILE
from .lapo import SolutionLengths, state_length


class EfficientReasoningTrainer(BaseTrainer):
    """
    Trainer for GRPO with one of the length rewards that the papers compare with.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Math accuracy by default; otherwise the first one tells which completions are correct (more than 0.5).
        args ([`EfficientReasoningConfig`], *optional*):
            Configuration; `length_reward` names the reward. Without one, this is GRPO.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt`; with `solution` for the default reward; with `target_tokens` for L1.
        eval_dataset, processing_class (*optional*):
            As in [`~trl.GRPOTrainer`].
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.

    Example:

    ```python
    from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = EfficientReasoningTrainer(
        load_model(),
        args=EfficientReasoningConfig("kimi", length_reward="kimi", max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self._solution_lengths = self._lapo_lengths(model)
        if self.args.length_reward is not None:
            self._add_reward_column(self._length_column, self.args.length_reward_weight)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.length_reward is not None:
            terms = self._length_term(inputs, completion_ids_list)
            self._fill_reward_column(rewards_per_func, self._length_column, terms)
        return rewards_per_func

    def _length_term(self, inputs, completion_ids_list) -> torch.Tensor:
        """Of the global batch, `(B_global,)`."""
        memory = self._solution_lengths
        keys = [] if memory is None else [memory.key(row["prompt"]) for row in inputs]
        asked = [row.get(TARGET_COLUMN, 0) for row in inputs] if memory is None else [memory.of(key) for key in keys]
        rows = [
            (len(ids), ids[-1] in self.eos_token_ids, target)
            for ids, target in zip(completion_ids_list, asked, strict=True)
        ]
        lengths, ended, targets = self.accelerator.gather(torch.tensor(rows, device=self.accelerator.device)).T
        if memory is not None and self.model.training:
            memory.record(gather_object(keys), lengths.tolist(), self._correct.tolist())
        return length_term(
            cast("str", self.args.length_reward),
            self.args.length_options(),
            lengths=lengths,
            correct=self._correct,
            num_generations=self._group_size,
            ended=ended.bool(),
            targets=targets,
            max_completion_length=cast("int", self.max_completion_length),
        )

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        memory = self._solution_lengths
        if memory is not None and memory.refine and self.model.training:
            prompt_ids = [
                state_length(ids, memory.of(memory.key(prompt)), self._tokenizer)
                for ids, prompt in zip(prompt_ids, prompts, strict=True)
            ]
        return prompt_ids, images, multimodal_fields

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._solution_lengths is not None and checkpoint is not None:
            self._solution_lengths.load(checkpoint)

    def _lapo_lengths(self, model) -> SolutionLengths | None:
        """LAPO's memory, in either stage."""
        stage = self.args.length_reward
        if stage not in ("lapo_discovery", "lapo_internalization"):
            return None
        file: str | None = None
        if stage == "lapo_internalization":
            folder = model if isinstance(model, str) else get_config_model_id(model.config)
            file = self.args.lapo_lengths or os.path.join(folder, LAPO_FILE)
            if not os.path.isfile(file):
                raise ValueError(
                    f"lapo_lengths: there is no file {file}. Train a model with length_reward='lapo_discovery' first, "
                    "and start from it, or set the file."
                )
        memory = SolutionLengths(cast("int", self.max_completion_length), stage == "lapo_internalization", file)
        self.add_callback(memory)
        return memory

    def _check_datasets(self, model, args, datasets, processing_class, *, needs_solution):
        super()._check_datasets(model, args, datasets, processing_class, needs_solution=needs_solution)
        if args.length_reward in TARGETS_IN_ROWS:
            for name, dataset in datasets.items():
                validate_targets(dataset, args.length_reward, name=name)

    @property
    def _length_column(self) -> str:
        return f"{self.args.length_reward}_length_reward"
