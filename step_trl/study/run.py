"""Train and evaluate every arm with every seed. What is done is not done again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from .. import testbed
from ..demo import EVALUATION, MAX_COMPLETION_LENGTH, TRAINING, Progress, sas_config, step_grpo_config
from ..evaluation import evaluate, load_benchmark
from ..rewards import math_accuracy_reward
from ..trainers import SASTrainer, StepGRPOTrainer
from .arms import Arm
from .phases import PhaseTimer


BETA = 0.001  # of the KL term, so that it can be followed; SAS's
PROBLEMS = 128  # of each evaluation set, from its first
SAMPLES = 4  # of each problem
VANILLA = "vanilla"


def build_trainer(arm: Arm, seed: int, output_dir: str, max_steps: int) -> GRPOTrainer:
    """The trainer of an arm on the testbed."""
    updates = round(max_steps * arm.budget)
    options: dict[str, Any] = {"beta": BETA, "seed": seed, "max_steps": updates} | arm.options
    if arm.checkpoints:
        every = max(1, updates // (arm.checkpoints + 1))
        options |= {"save_strategy": "steps", "save_steps": every, "save_only_model": True}
    shared = {
        "train_dataset": testbed.load_dataset("train"),
        "processing_class": testbed.load_tokenizer(),
        "callbacks": [Progress(f"{arm.name}, seed {seed}")],
    }
    model = testbed.load_model()
    trainer: GRPOTrainer
    if arm.method == "step_grpo":
        trainer = StepGRPOTrainer(model, args=step_grpo_config(output_dir, **options), **shared)
    elif arm.method == "sas":
        trainer = SASTrainer(model, args=sas_config(output_dir, **options), **shared)
    else:
        config = GRPOConfig(output_dir, **TRAINING | {"max_completion_length": MAX_COMPLETION_LENGTH} | options)
        trainer = GRPOTrainer(model, math_accuracy_reward, args=config, **shared)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_arm(arm: Arm, seed: int, folder: Path, max_steps: int) -> None:
    """
    Train and evaluate one arm with one seed, or go on with it.

    Args:
        arm ([`Arm`]), seed (`int`):
            What to run.
        folder (`Path`):
            Of the study. Writes `model/` (with the trainer's state and `phases.json`) below `ARM/SEED`, and samples:
            `samples/`, and `checkpoints/UPDATE/` where the arm has checkpoints.
        max_steps (`int`):
            Updates of an arm of budget 1.
    """
    own = folder / arm.name / str(seed)
    model = own / "model"
    if not model.exists():
        unfinished = own / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        trainer = build_trainer(arm, seed, str(unfinished), max_steps)
        timer, began = PhaseTimer(trainer), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.save_model()
        trainer.save_state()
        phases = {"seconds": seconds, "updates": timer.seconds}
        (unfinished / "phases.json").write_text(json.dumps(phases))
        unfinished.rename(model)
    for checkpoint in model.glob("checkpoint-*"):
        evaluate_model(checkpoint, own / "checkpoints" / checkpoint.name.removeprefix("checkpoint-"), samples=1)
    evaluate_model(model, own / "samples")


def evaluate_model(model: Path, save_to: Path, samples: int = SAMPLES) -> pd.DataFrame:
    """Samples of a model on the testbed's evaluation sets, as far as they are not there."""
    benchmarks = {
        name: load_benchmark(f"testbed-{name}").select(range(PROBLEMS)) for name in testbed.EVALUATION_SPLITS
    }
    return evaluate(model, benchmarks, n=samples, save_to=save_to, **EVALUATION)


def run_study(folder: Path, jobs: list[tuple[Arm, int]], max_steps: int) -> None:
    """
    Run all jobs that are not done, one after another.

    Args:
        folder (`Path`):
            For models and samples.
        jobs (`list[tuple[Arm, int]]`):
            What to run, see [`jobs`].
        max_steps (`int`):
            Updates of an arm of budget 1. A folder with another number is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": max_steps, "beta": BETA, "problems": PROBLEMS, "samples": SAMPLES}
    path = folder / "study.json"
    if path.exists() and (earlier := json.loads(path.read_text())) != settings:
        raise ValueError(f"output: {folder} holds a study with {earlier}, not {settings}. Set another folder.")
    path.write_text(json.dumps(settings) + "\n")
    evaluate_model(testbed.MODEL_DIR, folder / VANILLA / "samples")
    for number, (arm, seed) in enumerate(jobs, 1):
        print(f"{number} of {len(jobs)}: {arm.name}, seed {seed}", flush=True)
        run_arm(arm, seed, folder, max_steps)
