"""Without their features, our trainers are bitwise equal to TRL's GRPOTrainer, however it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small_runs import SMALL_RUN
from tiny_vlm import pictures, tiny_vlm
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from ways_of_use import (
    CONVERSATIONS,
    Counter,
    letters,
    moe,
    multiply,
    reward_model,
    rows,
    sampled_elsewhere,
    short_or_none,
    some_letters,
    streamed,
    waits,
    with_tools,
)

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


class Events(TrainerCallback):
    def __init__(self):
        self.seen: list[tuple] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(("step", state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(("log", logs.get("reward")))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(("evaluate", metrics["eval_reward"]))


@dataclass
class Use:
    """A way to use a trainer: options of its configuration, and its other arguments, created for each training."""

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
    """Return all logs but times, what callbacks saw, and the trained weights."""
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
