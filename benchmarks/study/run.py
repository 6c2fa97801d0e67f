"""Train and evaluate every arm with every seed. What is done is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from filelock import FileLock, Timeout
from trl import ModelConfig

from step_trl import testbed
from step_trl.cli.demo import EVALUATION, MAX_COMPLETION_LENGTH, TRAINING, sas_config, step_grpo_config
from step_trl.cli.distill import distill
from step_trl.cli.recipe import DistillArguments, DistillConfig
from step_trl.data import rewrite_prompts
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.files import atomic_write
from step_trl.token_targets import add_token_targets
from step_trl.trainers import EfficientReasoningConfig, EfficientReasoningTrainer, SASTrainer, StepGRPOTrainer

from .arms import ARMS, Arm
from .phases import PhaseTimer
from .prompted import teach_prompts


BETA = 0.001  # of the KL term, so that it can be followed; SAS's
PROBLEMS = 128  # of each evaluation set, from its first
SAMPLES = 4  # of each problem
VANILLA = "vanilla"
COMPLETIONS = TRAINING["per_device_train_batch_size"] * TRAINING["gradient_accumulation_steps"]  # of an update
SFT: dict[str, Any] = {
    "learning_rate": TRAINING["learning_rate"],
    "per_device_train_batch_size": 16,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def build_trainer(
    arm: Arm, seed: int, output_dir: str, max_steps: int, stage: int = 0, model: Path = testbed.MODEL_DIR
) -> EfficientReasoningTrainer:
    """The trainer of a stage of an arm, from a model of the testbed."""
    updates = round(max_steps * arm.budget / len(arm.stages))
    options: dict[str, Any] = {"beta": BETA, "seed": seed, "max_steps": updates} | arm.options | arm.stages[stage]
    at_most = options.get("length_reward") == "l1_max"
    rows = with_prompts(testbed.load_dataset("train"), options.pop("system_prompt", None), arm.targets, at_most, seed)
    if arm.checkpoints:
        every = max(1, updates // (arm.checkpoints + 1))
        options |= {"save_strategy": "steps", "save_steps": every, "save_only_model": True}
    shared = {
        "train_dataset": rows,
        "processing_class": testbed.load_tokenizer(),
    }
    trainer: EfficientReasoningTrainer
    if arm.method == "step_grpo":
        trainer = StepGRPOTrainer(str(model), args=step_grpo_config(output_dir, **options), **shared)
    elif arm.method == "sas":
        trainer = SASTrainer(str(model), args=sas_config(output_dir, **options), **shared)
    else:
        config = EfficientReasoningConfig(
            output_dir, **TRAINING | {"max_completion_length": MAX_COMPLETION_LENGTH} | options
        )
        trainer = EfficientReasoningTrainer(str(model), args=config, **shared)
    trainer.status.method = f"{arm.name}, seed {seed}"
    return trainer


def with_prompts(
    rows: Dataset,
    system_prompt: str | None,
    targets: tuple[int, int] | None,
    at_most: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows whose prompts say what an arm's do."""
    rows = rewrite_prompts(rows, None, system_prompt)
    return rows if targets is None else add_token_targets(rows, *targets, at_most=at_most, seed=seed)


def run_arm(arm: Arm, seed: int, folder: Path, max_steps: int, wait: bool = True) -> None:
    """
    Train and evaluate one arm with one seed, or go on with it; the one that it starts from first.

    Args:
        arm ([`Arm`]), seed (`int`):
            What to run.
        folder (`Path`):
            Of the study. Writes `model/` (with the trainer's state and `phases.json`) below `ARM/SEED`, and samples:
            `samples/`, `checkpoints/UPDATE/` where the arm has checkpoints, and `before/` of a model that it starts
            from, under its own prompts.
        max_steps (`int`):
            Updates of an arm of budget 1.
        wait (`bool`, *optional*, defaults to `True`):
            For another process that is at it; otherwise a `filelock.Timeout` is raised.
    """
    start = testbed.MODEL_DIR
    if arm.start is not None:
        run_arm(arm.start, seed, folder, max_steps)
        start = folder / arm.start.name / str(seed) / "model"
    own = folder / arm.name / str(seed)
    own.mkdir(parents=True, exist_ok=True)
    with FileLock(own / "lock", timeout=-1 if wait else 0):
        model = own / "model"
        if not model.exists():
            with atomic_write(model) as partial:
                began = time.perf_counter()
                phases = _make_model(arm, seed, partial, max_steps, start)
                seconds = time.perf_counter() - began
                (partial / "phases.json").write_text(json.dumps({"seconds": seconds, "updates": phases}))
        asked = arm.targets and (sum(arm.targets) // 2,) * 2
        prompts = (arm.stages[-1].get("system_prompt"), asked, arm.options.get("length_reward") == "l1_max")
        if arm.start is not None:
            evaluate_model(start, own / "before", 1, *prompts)
        for checkpoint in model.glob("checkpoint-*"):
            number = checkpoint.name.removeprefix("checkpoint-")
            evaluate_model(checkpoint, own / "checkpoints" / number, 1, *prompts)
        evaluate_model(model, own / "samples", SAMPLES, *prompts)


def _make_model(arm: Arm, seed: int, folder: Path, max_steps: int, start: Path) -> list[dict[str, float]]:
    """Train an arm into `folder`. Returns the seconds of the phases of each update, where there are any."""
    if arm.method == "distill":
        _distill(folder, seed, max_steps)
    elif arm.method == "prompts":
        teach_prompts(folder, seed, max_steps * COMPLETIONS // 2, **arm.options, **SFT)
    else:
        return _train(arm, seed, folder, max_steps, start)
    return []


def _train(arm: Arm, seed: int, folder: Path, max_steps: int, model: Path) -> list[dict[str, float]]:
    """All stages from `model`; the last one ends up in `folder` itself. Returns the seconds of the phases."""
    phases = []
    for stage in range(len(arm.stages)):
        output = folder if stage + 1 == len(arm.stages) else folder / f"stage-{stage + 1}"
        trainer = build_trainer(arm, seed, str(output), max_steps, stage, model)
        timer = PhaseTimer(trainer)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        phases += timer.seconds
        model = output
    return phases


def _distill(folder: Path, seed: int, max_steps: int) -> None:
    """As many samples as a training has, and an update per 16 of those that are kept, three times."""
    problems = max_steps * COMPLETIONS // 4
    arguments = DistillArguments("distill", "testbed", limit=problems, n=4, max_tokens=MAX_COMPLETION_LENGTH)
    distill(arguments, ModelConfig("testbed"), DistillConfig(str(folder), seed=seed, **SFT))


def evaluate_model(
    model: Path,
    save_to: Path,
    samples: int = SAMPLES,
    system_prompt: str | None = None,
    targets: tuple[int, int] | None = None,
    at_most: bool = False,
) -> pd.DataFrame:
    """Samples of a model on the testbed's evaluation sets, as far as they are not there."""
    benchmarks = {
        name: with_prompts(load_benchmark(f"testbed-{name}").select(range(PROBLEMS)), system_prompt, targets, at_most)
        for name in testbed.EVALUATION_SPLITS
    }
    return evaluate(model, benchmarks, n=samples, save_to=save_to, **EVALUATION)


def whole_evaluation() -> int:
    """Samples of an evaluated model."""
    return PROBLEMS * SAMPLES * len(testbed.EVALUATION_SPLITS)


def check_settings(field: str, folder: Path, max_steps: int, but_for: Container[str] = ()) -> dict[str, str]:
    """
    Compare today's settings with those of the study in a folder.

    Args:
        field (`str`), folder (`Path`):
            What errors call the folder, and the folder. It may hold no study.
        max_steps (`int`):
            Updates of an arm of budget 1.
        but_for (`Container[str]`, *optional*):
            Arms that may have others.

    Returns:
        `dict[str, str]`: of the arms that do, what has changed.

    Raises:
        `ValueError`: something else has changed; names `field` and the settings.
    """
    settings, earlier = _settings(max_steps), _recorded(folder)
    changed = [name for name, value in settings.items() if earlier.get(name, value) != value]
    if refused := [name for name in changed if name not in but_for]:
        told = "; ".join(f"{name}: {earlier[name]}, now {settings[name]}" for name in refused)
        raise ValueError(f"{field}: {folder} holds a study with other settings ({told}). Set another folder.")
    return {name: _changes(earlier[name], settings[name]) for name in changed}


def note_settings(folder: Path, max_steps: int, old: Container[str] = ()) -> None:
    """Write today's settings beside a study, but for those of old arms, which keep what they were trained with."""
    earlier = _recorded(folder)
    settings = {name: earlier[name] if name in old else value for name, value in _settings(max_steps).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _file(folder).write_text(json.dumps(settings, indent=1) + "\n")


def _file(folder: Path) -> Path:
    return folder / "study.json"


def _recorded(folder: Path) -> dict[str, Any]:
    return json.loads(_file(folder).read_text()) if _file(folder).exists() else {}


def _settings(max_steps: int) -> dict[str, Any]:
    """As they are read from a file."""
    settings: dict[str, Any] = {"max_steps": max_steps, "beta": BETA, "problems": PROBLEMS, "samples": SAMPLES}
    settings |= {"training": TRAINING, "evaluation": EVALUATION, "max_completion_length": MAX_COMPLETION_LENGTH}
    return json.loads(json.dumps(settings | {arm.name: _described(arm) for arm in ARMS}))


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Of what [`_described`] tells of an arm; its options one by one."""
    before, after = ({**arm, **arm["options"]} for arm in (earlier, now))
    names = [name for name in {**before, **after} if name != "options" and before.get(name) != after.get(name)]
    return ", ".join(
        f"`{name}` is {after.get(name, 'the default')}, was {before.get(name, 'the default')}" for name in names
    )


def _described(arm: Arm) -> dict[str, Any]:
    """What an arm trains with; where it appears, and how often it is evaluated, may change."""
    described = {name: getattr(arm, name) for name in ("method", "options", "budget", "stages", "targets")}
    return described | {"start": arm.start.name if arm.start else None}


def run_study(
    folder: Path, jobs: list[tuple[Arm, int]], max_steps: int, done: Container[tuple[str, int]] = ()
) -> None:
    """
    Run all jobs that are not done, one after another; those that another process is at are left to it.

    Args:
        folder (`Path`):
            For models and samples.
        jobs (`list[tuple[Arm, int]]`):
            What to run, see [`jobs`].
        max_steps (`int`):
            Updates of an arm of budget 1. A folder with another number is refused.
        done (`Container[tuple[str, int]]`, *optional*):
            Names and seeds of arms that are left out, that of the vanilla model, seed 0, included.
    """
    check_settings("output_dir", folder, max_steps)
    note_settings(folder, max_steps)
    if (VANILLA, 0) not in done:
        (folder / VANILLA).mkdir(exist_ok=True)
        with FileLock(folder / VANILLA / "lock"):
            evaluate_model(testbed.MODEL_DIR, folder / VANILLA / "samples")
    jobs = [(arm, seed) for arm, seed in jobs if (arm.name, seed) not in done]
    for number, (arm, seed) in enumerate(jobs, 1):
        print(f"{number} of {len(jobs)}: {arm.name}, seed {seed}", flush=True)
        try:
            run_arm(arm, seed, folder, max_steps, wait=False)
        except Timeout:
            print("under way in another process", flush=True)
