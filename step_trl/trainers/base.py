"""What the trainers share: a default reward, checks before anything is loaded, correctness, and signal warnings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..data import validate_prompt_lengths, validate_rows
from ..rewards import math_accuracy_reward
from ..runtime.checkpoints import ResumableTrainer
from ..runtime.micro_batches import sort_by_length, trim_padding
from ..runtime.model_card import ModelCardTrainer
from ..runtime.sharding import ShardedTrainer
from ..runtime.signal_warnings import SignalWarnings
from .base_config import EfficientReasoningConfig
from .served import ServedTrainer, loading_options


class BaseTrainer(ModelCardTrainer, ResumableTrainer, ShardedTrainer, ServedTrainer):
    """
    [`~trl.GRPOTrainer`] that knows which completions are correct.

    The first reward function is the correctness signal: a completion is correct when it returns more than 0.5. Without
    reward functions, the signal is the environment's own reward where there is one, and otherwise math accuracy
    against the row's `solution`.

    A completion whose reward functions all return `None` counts as not correct, and is not trained on, as in TRL: the
    columns that our trainers add are `None`, too.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`], see above for the first one.
        args ([`EfficientReasoningConfig`], *optional*):
            Configuration of the class named by `config_class`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Rows with `prompt` and what the reward functions need.
        eval_dataset, processing_class, reward_processing_classes (*optional*):
            As in [`~trl.GRPOTrainer`].
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.
    """

    config_class: type[EfficientReasoningConfig] = EfficientReasoningConfig
    args: EfficientReasoningConfig
    model: PreTrainedModel
    _correct: torch.Tensor  # (B_global,) bool, of the batch scored last
    _unscorable: torch.Tensor  # (B_global,) bool: no reward function has scored the completion
    _correctness_columns: int = 1  # of the rewards, from the first
    _loss_inputs: dict[str, Any] | None = None  # of the loss whose forward pass is under way

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"args: a {type(args).__name__} is no {self.config_class.__name__}. Give {type(self).__name__} a "
                f"{self.config_class.__name__}, which has all fields of GRPOConfig."
            )
        if reward_funcs is not None and args.require_end_of_thinking != type(args).require_end_of_thinking:
            raise ValueError(
                f"require_end_of_thinking: {args.require_end_of_thinking} is about the default reward, and there are "
                "reward_funcs. Leave it out, or give functools.partial(math_accuracy_reward, "
                f"require_end_of_thinking={args.require_end_of_thinking}) as the first of them."
            )
        if kwargs.get("environment_factory") is None:  # otherwise the environment owns the prompts
            datasets = _by_name(train_dataset, eval_dataset)
            self._check_datasets(model, args, datasets, processing_class, needs_solution=reward_funcs is None)
        super().__init__(
            model,
            _default_reward(args) if reward_funcs is None else _own_list(reward_funcs),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=_own_list(reward_processing_classes),
            **kwargs,
        )
        if reward_funcs is None:
            self._prefer_the_environments_rewards()
        self.add_callback(SignalWarnings())

    def _prefer_the_environments_rewards(self) -> None:
        """Drop the default reward where TRL has found rewards of environments: a column for each of their classes."""
        environments = len(self.reward_funcs) - 1
        if environments == 0:
            return
        for columns in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            del columns[0]
        self.reward_weights = self.reward_weights[1:]
        self._correctness_columns = environments
        self.status.headline = self._headline()

    def _check_datasets(
        self, model, args, datasets: dict[str, Any], processing_class, *, needs_solution: bool
    ) -> None:
        """Fail on unusable rows before a model is loaded; `datasets` by what errors call them."""
        loading = loading_options(args)
        config = AutoConfig.from_pretrained(model, **loading) if isinstance(model, str) else model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        tokenizer = processing_class
        if tokenizer is None and isinstance(model, str):
            tokenizer = AutoTokenizer.from_pretrained(model, **loading)
        for name, dataset in datasets.items():
            validate_rows(dataset, needs_solution=needs_solution, name=name)
            if context is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
                validate_prompt_lengths(dataset, tokenizer, context, args.max_completion_length, name=name)

    def _prepare_inputs(self, generation_batch):
        steps_per_generation = cast("int", self.args.steps_per_generation)  # TRL has filled it in
        generate_every = steps_per_generation * self.num_iterations
        generated = self.model.training and (self._step % generate_every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        if not generated or self._buffered_inputs is None or not self.args.reduce_padding:
            return inputs
        if self._may_sort(inputs):
            self._buffered_inputs = sort_by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
        multiple = cast("int | None", self.pad_to_multiple_of)  # TRL has resolved "auto"
        self._buffered_inputs = [trim_padding(batch, multiple) for batch in self._buffered_inputs]
        return self._buffered_inputs[self._step % steps_per_generation]

    def _may_sort(self, inputs: dict[str, Any]) -> bool:
        """Whether the gradient of an update does not depend on which rows share a micro-batch."""
        args = self.args
        return (
            cast("int", args.steps_per_generation) % args.gradient_accumulation_steps == 0
            and args.loss_type != "bnpo"  # normalised by the micro-batch's own tokens
            and args.top_entropy_quantile == 1.0  # a quantile of the micro-batch
            and not self._entropy_bonus_enabled  # a mean over its tokens
            and not self.aux_loss_enabled  # balances the experts within it
            and not any(isinstance(value, list) for value in inputs.values())  # images
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._correct = (rewards_per_func[:, : self._correctness_columns] > 0.5).any(dim=1)  # NaN is not
        self._unscorable = rewards_per_func.isnan().all(dim=1)
        self._follow_rewards(inputs, self._local(self._correct).tolist())
        return rewards_per_func

    def _fill_reward_column(self, rewards_per_func: torch.Tensor, name: str, rewards: torch.Tensor) -> None:
        """Write the rewards `(B_global,)` of a column; NaN where the others are, so that TRL leaves the row out."""
        column = self.reward_func_names.index(name)
        rewards_per_func[:, column] = rewards.to(rewards_per_func).masked_fill(self._unscorable, torch.nan)

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

    def _add_reward_column(self, name: str, weight: float) -> None:
        """A column that `_fill_reward_column` is to fill in once the others are known and gathered."""
        self.reward_func_names.append(name)
        self.reward_funcs.append(_no_reward_yet)  # type: ignore[arg-type]  # TRL's type has no list of None alone
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


def _own_list(values: Any) -> Any:
    """A list that columns can be added to without a change to the caller's."""
    return list(values) if isinstance(values, list) else values


def _no_reward_yet(completions, **kwargs) -> list[None]:
    """`None`, so that TRL sees whether any other function has scored a completion, and warns where none has."""
    return [None] * len(completions)


def _default_reward(args: EfficientReasoningConfig) -> Callable[..., Any]:
    return partial(math_accuracy_reward, require_end_of_thinking=args.require_end_of_thinking)


def _by_name(train_dataset, eval_dataset) -> dict[str, Any]:
    """The data sets that there are, by what errors call them."""
    datasets = {"train_dataset": train_dataset}
    datasets |= eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}
