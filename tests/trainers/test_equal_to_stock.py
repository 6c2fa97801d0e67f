"""Without their features, our trainers are TRL's GRPOTrainer, to the bit, however it is used."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from small_runs import SMALL_RUN
from tiny_vlm import pictures, tiny_vlm
from transformers import (
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

from step_trl import (
    EfficientReasoningConfig,
    EfficientReasoningTrainer,
    SASConfig,
    SASTrainer,
    StepGRPOConfig,
    StepGRPOTrainer,
    testbed,
)


PLAIN = {"reduce_padding": False}
OURS = {  # with all features off
    "efficient": (EfficientReasoningTrainer, EfficientReasoningConfig, PLAIN),
    "step_grpo": (
        StepGRPOTrainer,
        StepGRPOConfig,
        PLAIN | {"truncated_rollout": False, "step_reward": False, "format_reward": False},
    ),
    "sas": (  # the rule of failed completions, for less than one step
        SASTrainer,
        SASConfig,
        PLAIN | {"selection": "failed", "selection_ratio": 1e-6},
    ),
}
OPTIONS = SMALL_RUN | {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 12,
}
TEXTS = [
    f"<|im_start|>user\nCalculate {n} + {n * n * n}.<|im_end|>\n<|im_start|>assistant\n<think>\n" for n in range(9)
]
CONVERSATIONS = [[{"role": "user", "content": f"Calculate {n} + {n * n * n}."}] for n in range(9)]


def text_of(completion):
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


def letters(completions, **kwargs):
    """From 0 to 1, and not the same for any two completions of a group, or hardly ever."""
    return [sum(map(ord, text_of(completion))) % 97 / 96 for completion in completions]


def short_or_none(completions, log_metric=None, **kwargs):
    log_metric("letters", float(sum(len(text_of(completion)) for completion in completions)))
    return [None if len(text_of(completion)) % 2 else -len(text_of(completion)) / 50 for completion in completions]


def some_letters(completions, **kwargs):
    """Not for a third of them."""
    return [value if round(96 * value) % 3 else None for value in letters(completions)]


async def waits(completions, **kwargs):
    return letters(completions)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment that owns its reward, which is 0 and 1 by turns."""

    turns = itertools.cycle([0.0, 1.0])

    def reset(self, **kwargs) -> str:
        self.count = len(str(kwargs["prompt"])) % 3
        return f" Count to {self.count}."

    def increment(self, step: int) -> int:
        """
        Increments the counter.

        Args:
            step: What is added.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return next(self.turns)


class Events(TrainerCallback):
    def __init__(self):
        self.seen: list[tuple] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(("step", state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(("log", logs.get("reward")))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(("evaluate", metrics["eval_reward"]))


def sampled_elsewhere(prompts, trainer):
    ids = trainer.processing_class(prompts)["input_ids"]
    completions = [[20 + (len(ids[0]) * row + place) % 9 for place in range(2 + row)] for row in range(len(ids))]
    completions = [row + [2] * (len(row) % 2) for row in completions]  # others are cut off
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[-1.0] * len(row) for row in completions]}


@cache
def reward_model():
    set_seed(0)
    config = Qwen3Config(
        vocab_size=463, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, name_or_path="reward-model",
    )  # fmt: skip
    return Qwen3ForSequenceClassification(config)


def moe():
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=463, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.1,
        decoder_sparse_step=1, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def with_tools():
    """The testbed's tokenizer with a chat template that knows tools."""
    tokenizer = testbed.load_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def rows(prompts=TEXTS, **columns):
    return Dataset.from_dict({"prompt": prompts} | columns)


def streamed():
    return IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS))


@dataclass
class Use:
    """A way to use a trainer: options of its configuration, and its other arguments, made anew for each training."""

    options: dict[str, Any] = field(default_factory=dict)
    arguments: Any = dict


USES = {
    "text": Use(),
    "conversations": Use({}, lambda: {"train_dataset": rows(CONVERSATIONS)}),
    "adapter": Use({"beta": 0.1}, lambda: {"peft_config": LoraConfig(r=2, target_modules="all-linear")}),
    "streamed data": Use({}, lambda: {"train_dataset": streamed()}),
    "two evaluations": Use(
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 1},
        lambda: {"eval_dataset": {"first": rows().select(range(2)), "last": rows().select([8])}},
    ),
    "several rewards": Use({"reward_weights": [0.5, 2.0]}, lambda: {"reward_funcs": [letters, short_or_none]}),
    "some unscorable": Use(
        {"num_generations": 4, "per_device_train_batch_size": 8},
        lambda: {"reward_funcs": [some_letters, some_letters]},
    ),
    "normalised rewards": Use(
        {"multi_objective_aggregation": "normalize_then_sum"}, lambda: {"reward_funcs": [short_or_none, letters]}
    ),
    "async reward": Use({"scale_rewards": "batch"}, lambda: {"reward_funcs": waits}),
    "reward model": Use(
        {},
        lambda: {
            "reward_funcs": [reward_model(), letters],
            "reward_processing_classes": [testbed.load_tokenizer(), None],
        },
    ),
    "iterations": Use({"num_iterations": 2, "max_steps": 3, "beta": 0.1}),
    "late updates": Use({"steps_per_generation": 2, "importance_sampling_level": "sequence", "max_steps": 3}),
    "accumulation": Use({"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "scale_rewards": "none"}),
    "off-policy mask": Use({"num_iterations": 2, "off_policy_mask_threshold": 1e-4, "delta": 1.5}),
    "entropy": Use({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}),
    "adaptive entropy": Use({"use_adaptive_entropy": True, "entropy_target": 9.0, "gradient_accumulation_steps": 2}),
    "moved reference": Use(
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "use_bias_correction_kl": False}
    ),
    "sampling": Use(
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
        | {"generation_kwargs": {"suppress_tokens": [5, 6]}, "shuffle_dataset": False}
    ),
    "experts": Use({}, lambda: {"model": moe()}),
    "environment": Use(
        {"max_steps": 1, "max_completion_length": 6},
        lambda: {
            "train_dataset": rows(CONVERSATIONS),
            "environment_factory": Counter,
            "tools": [multiply],
            "processing_class": with_tools(),
            "reward_funcs": None,
        },
    ),
    "rollout function": Use(
        {"mask_truncated_completions": True, "pad_to_multiple_of": 8}, lambda: {"rollout_func": sampled_elsewhere}
    ),
    **{
        loss_type: Use({"loss_type": loss_type, "num_iterations": 2})
        for loss_type in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
    },
    "images": Use(
        {"num_iterations": 2},
        lambda: dict(zip(("model", "processing_class"), tiny_vlm(), strict=True)) | {"train_dataset": pictures()},
    ),
}
SELDOM = {"efficient": ("text", "images", "some unscorable", "two evaluations"), "sas": ("text", "iterations", "grpo")}
CASES = [
    *((name, "step_grpo") for name in USES),
    *((name, ours) for ours, names in SELDOM.items() for name in names),
]


def train(trainer_class, config_class, folder, use: Use, **features):
    """Everything that was logged but times, what callbacks saw, and the trained weights."""
    events = Events()
    arguments = {"reward_funcs": letters, "train_dataset": rows()} | use.arguments()
    arguments.setdefault("processing_class", testbed.load_tokenizer())
    if "model" not in arguments:
        arguments["model"] = testbed.load_model()
    trainer = trainer_class(
        args=config_class(str(folder), **OPTIONS | use.options | features), callbacks=[events], **arguments
    )
    trainer.train()
    logs = [
        {name: value for name, value in entry.items() if not name.endswith(("time", "per_second"))}
        for entry in trainer.state.log_history
    ]
    return logs, events.seen, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock("text")`: the same use of GRPOTrainer, trained once."""
    return cache(lambda name: train(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("stock"), USES[name]))


@pytest.mark.parametrize(("name", "ours"), CASES)
def test_losses_metrics_and_weights_are_equal(stock, tmp_path, name, ours):
    trainer_class, config_class, features = OURS[ours]
    logs, seen, weights = train(trainer_class, config_class, tmp_path, USES[name], **features)
    stock_logs, stock_seen, stock_weights = stock(name)
    assert len(logs) == len(stock_logs)
    for entry, stock_entry in zip(logs, stock_logs, strict=True):
        assert {key: entry[key] for key in stock_entry} == stock_entry
    assert seen == stock_seen
    assert weights.keys() == stock_weights.keys()
    assert all(torch.equal(weights[key], stock_weights[key]) for key in weights)
    assert any(entry.get("grad_norm", 0) > 0 for entry in logs)
