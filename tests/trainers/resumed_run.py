"""A training of seven updates on one process or on two, also resumed after its fifth."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from small_runs import SMALL_RUN, every_other
from trainers.equal_ranks import shard_on_cpu, write
from transformers import Trainer

from step_trl import (
    LAPOConfig,
    LAPOTrainer,
    SASConfig,
    SASTrainer,
    StepGRPOConfig,
    StepGRPOTrainer,
    testbed,
)


# Without a GPU, transformers loads the optimizer of the second process to "cpu:1", which torch.load does not know.
torch.serialization.register_package(
    50, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
RANKS = int(os.environ.get("WORLD_SIZE", 1))
# An epoch is four updates. The fifth is in the second epoch; where a generation is for two, it leaves one to be made.
OPTIONS = SMALL_RUN | {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 5,
    "learning_rate": 1e-3,
    "num_generations": 4,
    "per_device_train_batch_size": 4 // RANKS,
    "max_completion_length": 24,
    "beta": 0.01,
    "seed": 5,
}
METHODS = {
    "step_grpo": (StepGRPOTrainer, StepGRPOConfig, {"steps_per_generation": 2}),
    "sas": (SASTrainer, SASConfig, {"criterion": "random", "num_iterations": 2}),
    "lapo": (LAPOTrainer, LAPOConfig, {}),
}


def build(method: str, folder: Path, how: str) -> Trainer:
    trainer_class, config_class, own = METHODS[method]
    config = config_class(str(folder), **OPTIONS | own)
    if how == "fsdp2":
        shard_on_cpu()
    return trainer_class(
        testbed.load_model(),
        every_other,
        args=config,
        train_dataset=testbed.load_dataset("easy").select(range(2 if method == "sas" else 4)),
        processing_class=testbed.load_tokenizer(),
    )


def train_and_resume(method: str, folder: Path, how: str = "ddp") -> None:
    for run in ("whole", "resumed"):
        torch.manual_seed(0 if run == "whole" else 1)  # what the checkpoint has must win
        trainer = build(method, folder / f"{method}-{run}", how)
        trainer.train(resume_from_checkpoint=None if run == "whole" else str(folder / f"{method}-whole/checkpoint-5"))
        write(trainer, folder / f"{method}-{run}")
