"""What the trainers share: a default reward, checks before anything is loaded, correctness, and signal warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..data import validate_prompt_lengths, validate_rows
from ..rewards import math_accuracy_reward
from .base_config import EfficientReasoningConfig
from .batching import sort_by_length, trim_padding
from .model_card import ModelCardTrainer
from .resume import ResumableTrainer
from .served import ServedTrainer, loading_options
from .sharding import ShardedTrainer
from .signals import SignalWarnings


class BaseTrainer(ModelCardTrainer, ResumableTrainer, ShardedTrainer, ServedTrainer):
    """
    [`~trl.GRPOTrainer`] that knows which completions are correct.

    The first reward function is the correctness signal: a completion is correct when it returns more than 0.5. Without
    reward functions, it is math accuracy against the row's `solution`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`], see above for the first one.
        args ([`EfficientReasoningConfig`], *optional*):
            Configuration of the class named by `config_class`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Rows with `prompt` and what the reward functions need.
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.
    """

    config_class: type[EfficientReasoningConfig] = EfficientReasoningConfig
    default_reward: Callable[..., Any] = staticmethod(math_accuracy_reward)
    args: EfficientReasoningConfig
    model: PreTrainedModel
    _correct: torch.Tensor  # (B_global,) bool, of the batch scored last
    _loss_inputs: dict[str, Any] | None = None  # of the loss whose forward pass is under way

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"args: a {type(args).__name__} is no {self.config_class.__name__}. Give {type(self).__name__} a "
                f"{self.config_class.__name__}, which has all fields of GRPOConfig."
            )
        self._check_datasets(model, args, train_dataset, reward_funcs is None, kwargs)
        super().__init__(
            model,
            self.default_reward if reward_funcs is None else reward_funcs,
            args,
            train_dataset=train_dataset,
            **kwargs,
        )
        self.add_callback(SignalWarnings())

    def _check_datasets(
        self, model, args, train_dataset, needs_solution: bool, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Fail on unusable rows before a model is loaded. Returns the data sets by what errors call them."""
        if kwargs.get("environment_factory") is not None:
            return {}  # the environment owns the prompts
        evaluation = kwargs.get("eval_dataset")
        datasets = {"train_dataset": train_dataset}
        datasets |= evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
        datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        loading = loading_options(args)
        config = AutoConfig.from_pretrained(model, **loading) if isinstance(model, str) else model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None and isinstance(model, str):
            tokenizer = AutoTokenizer.from_pretrained(model, **loading)
        for name, dataset in datasets.items():
            validate_rows(dataset, needs_solution=needs_solution, name=name)
            if context is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
                validate_prompt_lengths(dataset, tokenizer, context, args.max_completion_length, name=name)
        return datasets

    def _prepare_inputs(self, generation_batch):
        steps_per_generation = cast("int", self.args.steps_per_generation)  # TRL has filled it in
        generate_every = steps_per_generation * self.num_iterations
        generated = self.model.training and (self._step % generate_every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        if not generated or self._buffered_inputs is None:
            return inputs
        if self._may_sort(inputs):
            self._buffered_inputs = sort_by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
        self._buffered_inputs = [trim_padding(batch) for batch in self._buffered_inputs]
        return self._buffered_inputs[self._step % steps_per_generation]

    def _may_sort(self, inputs: dict[str, Any]) -> bool:
        """Whether the gradient of an update does not depend on which rows share a micro-batch."""
        args = self.args
        return (
            args.sort_by_length
            and cast("int", args.steps_per_generation) % args.gradient_accumulation_steps == 0
            and args.loss_type not in ("bnpo", "luspo")  # normalised by the micro-batch's own tokens
            and args.top_entropy_quantile == 1.0  # a quantile of the micro-batch
            and not any(isinstance(value, list) for value in inputs.values())  # images
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._correct = rewards_per_func[:, 0] > 0.5  # NaN, an unscorable completion, is not correct
        self._follow_rewards(inputs, self._local(self._correct).tolist())
        return rewards_per_func

    def _compute_loss(self, model, inputs):
        self._loss_inputs = inputs = dict(inputs)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, self._loss_inputs = self._loss_inputs, None
        if inputs is not None:
            self._refine_loss_inputs(inputs, logps.detach())
            self._follow_loss(inputs, logps.detach())
        return logps, entropies, aux_loss

    def _refine_loss_inputs(self, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """
        Change what the loss reads after its forward pass, advantages and reference log-probabilities, now that the
        policy's log-probabilities `(B, T)` are known.
        """

    def _add_reward_column(self, name: str, reward_func: Callable[..., Any], weight: float) -> None:
        self.reward_func_names.append(name)
        self.reward_funcs.append(reward_func)
        self.reward_processing_classes.append(None)  # type: ignore[arg-type]  # as TRL's own for functions
        self.reward_weights = torch.cat([self.reward_weights, self.reward_weights.new_tensor([weight])])

    @property
    def _group_size(self) -> int:
        return cast("int", self.num_generations if self.model.training else self.num_generations_eval)

    @property
    def _mode(self) -> str:
        """Key of `_metrics`, as TRL's hooks compute it."""
        return "train" if self.model.training else "eval"

    def _local(self, gathered: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor gathered over all of them."""
        return gathered.chunk(self.accelerator.num_processes)[self.accelerator.process_index]


def filled_in_after_the_gather(completions, **kwargs) -> list[float]:
    """Placeholder of a column that is relative to a group: a process may see only a part of one."""
    return [0.0] * len(completions)
