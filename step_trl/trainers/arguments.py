"""What a trainer is given: checked before a model is loaded, and filled in where it is left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..data import validate_prompt_lengths, validate_rows
from ..rewards import math_accuracy_reward
from ..rewards.length_rewards import TARGETS_IN_ROWS
from ..runtime.policy_engine import loading_options
from ..token_targets import validate_targets
from .base_config import EfficientReasoningConfig


def checked_args(
    trainer: type[GRPOTrainer], config: type[EfficientReasoningConfig], model, args, *, has_reward_funcs: bool
):
    """Return the configuration of a trainer, by default one that is named after the model and the trainer."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config(f"{name.split('/')[-1]}-{trainer._name}")
    elif not isinstance(args, config):
        raise TypeError(
            f"args: a {type(args).__name__} is not a {config.__name__}. Give {trainer.__name__} a {config.__name__}, "
            "which has all fields of GRPOConfig."
        )
    if has_reward_funcs and args.require_end_of_thinking != type(args).require_end_of_thinking:
        raise ValueError(
            f"require_end_of_thinking: {args.require_end_of_thinking} is only for the default reward, but there "
            "are reward_funcs. Leave it out, or give functools.partial(math_accuracy_reward, "
            f"require_end_of_thinking={args.require_end_of_thinking}) as the first of them."
        )
    return args


def datasets_by_name(train_dataset, eval_dataset) -> dict[str, Any]:
    """Return the given data sets by their names in messages."""
    datasets = {"train_dataset": train_dataset}
    datasets |= eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}


def check_datasets(
    model, args: EfficientReasoningConfig, datasets: dict[str, Any], processing_class, *, needs_solution: bool
) -> None:
    """Raise an error for unusable rows. The keys of `datasets` are names for messages."""
    loading = loading_options(args)
    config = AutoConfig.from_pretrained(model, **loading) if isinstance(model, str) else model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer = processing_class
    if tokenizer is None and isinstance(model, str):
        tokenizer = AutoTokenizer.from_pretrained(model, **loading)
    for name, dataset in datasets.items():
        validate_rows(dataset, needs_solution=needs_solution, name=name)
        if context is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
            validate_prompt_lengths(dataset, tokenizer, context, cast("int", args.max_completion_length), name=name)
        if args.length_reward in TARGETS_IN_ROWS:
            validate_targets(dataset, args.length_reward, name=name)


def default_reward(args: EfficientReasoningConfig) -> Callable[..., Any]:
    return partial(math_accuracy_reward, require_end_of_thinking=args.require_end_of_thinking)


def own_list(values: Any) -> Any:
    """Return a copy of a list, so that adding columns does not change the caller's list."""
    return list(values) if isinstance(values, list) else values


def no_reward_yet(completions, **kwargs) -> list[None]:
    """Return `None` for each completion, so that TRL warns if no other function has scored it."""
    return [None] * len(completions)
