"""Train and evaluate every arm with every seed. Finished parts are not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Container
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from filelock import FileLock, Timeout
from trl import ModelConfig

from step_trl import testbed
from step_trl.cli.arguments import DistillArguments, DPOArguments, FineTuningConfig, PreferenceConfig
from step_trl.cli.demo import EVALUATION, MAX_COMPLETION_LENGTH, TRAINING
from step_trl.cli.distill import distill
from step_trl.cli.prefer import prefer
from step_trl.cli.sources import load_reward_funcs
from step_trl.data import rewrite_prompts
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.files import atomic_write
from step_trl.preferences import read_rollouts, thin_easy_prompts
from step_trl.token_targets import add_token_targets
from step_trl.trainers import METHODS, EfficientReasoningTrainer

from .arms import ARMS, SHORT_CONTEXT, Arm
from .phases import PhaseTimer
from .prompted import teach_prompts


BETA = 0.001  # of the KL term, so that it is logged; SAS's value
PROBLEMS = 128  # the number of first problems of each evaluation set
SAMPLES = 4  # per problem
VANILLA = "vanilla"
SETTINGS = "study.json"
COMPLETIONS = TRAINING["per_device_train_batch_size"] * TRAINING["gradient_accumulation_steps"]  # per update
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
    arm: Arm,
    seed: int,
    output_dir: str,
    max_steps: int,
    stage: int = 0,
    model: Path = testbed.MODEL_DIR,
    rollouts: Path | None = None,
) -> EfficientReasoningTrainer:
    """Build the trainer of a stage of an arm, from a testbed model. `rollouts` are for arms with `easy_prompts`."""
    updates = round(max_steps * arm.budget / len(arm.stages))
    options: dict[str, Any] = {"beta": BETA, "seed": seed, "max_steps": updates} | arm.options | arm.stages[stage]
    at_most = options.get("length_reward") == "l1_max"
    rows = with_prompts(testbed.load_dataset("train"), options.pop("system_prompt", None), arm.targets, at_most, seed)
    if (share := options.pop("easy_prompts", None)) is not None and rollouts is not None:
        rows = thin_easy_prompts(rows, read_rollouts(rollouts), share, seed)
    if arm.checkpoints:
        every = max(1, updates // (arm.checkpoints + 1))
        options |= {"save_strategy": "steps", "save_steps": every, "save_only_model": True}
    trainer_class, config_class = METHODS[arm.method]
    context = {"max_completion_length": SHORT_CONTEXT if arm.method == "sas" else MAX_COMPLETION_LENGTH}
    reward_funcs = load_reward_funcs(options.pop("reward_funcs", None))
    trainer = trainer_class(
        str(model),
        reward_funcs,
        args=config_class(output_dir, **TRAINING | context | options),
        train_dataset=rows,
        processing_class=testbed.load_tokenizer(),
    )
    trainer.status.method = f"{arm.name}, seed {seed}"
    return trainer


def with_prompts(
    rows: Dataset,
    system_prompt: str | None,
    targets: tuple[int, int] | None,
    at_most: bool = False,
    seed: int = 0,
) -> Dataset:
    """Return the rows with the text that an arm adds to its prompts."""
    rows = rewrite_prompts(rows, None, system_prompt)
    return rows if targets is None else add_token_targets(rows, *targets, at_most=at_most, seed=seed)


def run_arm(
    arm: Arm, seed: int, folder: Path, max_steps: int, wait: bool = True, problems: range | None = None
) -> pd.DataFrame:
    """
    Train and evaluate one arm with one seed, or resume it. The arm that it starts from is run first.

    In `ARM/SEED` in `folder`, the model is saved to `model/` (with the trainer's state and `phases.json`), and samples
    to `samples/`, to `checkpoints/UPDATE/` if the arm has checkpoints, and to `before/` for a model that it starts
    from, with its own prompts. `max_steps` are the updates of an arm with budget 1. If another process is running the
    arm, wait for it, or raise a `filelock.Timeout` without `wait`. `problems` of each evaluation set are sampled, by
    default the first [`PROBLEMS`], and the samples returned.
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
                phases = _make_model(arm, seed, partial, max_steps, start, recorded_rollouts(arm, seed, folder))
                seconds = time.perf_counter() - began
                (partial / "phases.json").write_text(json.dumps({"seconds": seconds, "updates": phases}))
        asked = arm.targets and (sum(arm.targets) // 2,) * 2
        prompts = (arm.stages[-1].get("system_prompt"), asked, arm.options.get("length_reward") == "l1_max")
        if arm.start is not None and arm.start.method == "prompts":
            evaluate_model(start, own / "before", 1, *prompts)
        for checkpoint in model.glob("checkpoint-*"):
            number = checkpoint.name.removeprefix("checkpoint-")
            evaluate_model(checkpoint, own / "checkpoints" / number, 1, *prompts)
        return evaluate_model(model, own / "samples", SAMPLES, *prompts, problems=problems)


def recorded_rollouts(arm: Arm, seed: int, folder: Path) -> Path | None:
    """Return the model folder of the last arm before this one that has recorded rollouts."""
    start = arm.start
    while start is not None and not start.options.get("record_rollouts"):
        start = start.start
    return None if start is None else folder / start.name / str(seed) / "model"


def _make_model(
    arm: Arm, seed: int, folder: Path, max_steps: int, start: Path, rollouts: Path | None
) -> list[dict[str, float]]:
    """Train an arm into `folder`. Return the seconds of the phases of each update, none without rollouts."""
    if arm.method == "distill":
        _distill(folder, seed, max_steps, arm.options)
    elif arm.method == "dpo" and rollouts is not None:
        asked, training = _split(arm.options, DPOArguments)
        config = PreferenceConfig(str(folder), seed=seed, **SFT | training)
        prefer(rollouts, DPOArguments("dpo", **asked), ModelConfig(str(start)), config)
    elif arm.method == "prompts":
        teach_prompts(folder, seed, max_steps * COMPLETIONS // 2, **arm.options, **SFT)
    else:
        return _train(arm, seed, folder, max_steps, start, rollouts)
    return []


def _train(
    arm: Arm, seed: int, folder: Path, max_steps: int, model: Path, rollouts: Path | None
) -> list[dict[str, float]]:
    """Train all stages from `model`; the last one is saved to `folder` itself. Return the seconds of the phases."""
    phases = []
    for stage in range(len(arm.stages)):
        output = folder if stage + 1 == len(arm.stages) else folder / f"stage-{stage + 1}"
        trainer = build_trainer(arm, seed, str(output), max_steps, stage, model, rollouts)
        timer = PhaseTimer(trainer)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        phases += timer.seconds
        model = output
    return phases


def _distill(folder: Path, seed: int, max_steps: int, options: dict[str, Any]) -> None:
    """
    Sample as many completions as a training does, and make one update per 16 kept ones, by default for three epochs.
    """
    asked, training = _split(options, DistillArguments)
    sampling = {"limit": max_steps * COMPLETIONS // 4, "n": 4, "max_tokens": MAX_COMPLETION_LENGTH} | asked
    arguments = DistillArguments("distill", "testbed", **sampling)
    distill(arguments, ModelConfig("testbed"), FineTuningConfig(str(folder), seed=seed, **SFT | training))


def _split(options: dict[str, Any], arguments: type[DistillArguments | DPOArguments]) -> tuple[dict, dict]:
    """Return the options that are fields of `arguments`, and the others, which are those of the training."""
    asked = {one.name for one in fields(arguments)}
    return (
        {name: value for name, value in options.items() if name in asked},
        {name: value for name, value in options.items() if name not in asked},
    )


def evaluate_model(
    model: Path,
    save_to: Path,
    samples: int = SAMPLES,
    system_prompt: str | None = None,
    targets: tuple[int, int] | None = None,
    at_most: bool = False,
    problems: range | None = None,
) -> pd.DataFrame:
    """Sample a model on the testbed's evaluation sets, except for samples that already exist."""
    problems = range(PROBLEMS) if problems is None else problems
    benchmarks = {
        name: with_prompts(load_benchmark(f"testbed-{name}").select(problems), system_prompt, targets, at_most)
        for name in testbed.EVALUATION_SPLITS
    }
    return evaluate(model, benchmarks, n=samples, save_to=save_to, **EVALUATION)


def whole_evaluation() -> int:
    """Return all samples of an evaluated model."""
    return PROBLEMS * SAMPLES * len(testbed.EVALUATION_SPLITS)


def check_settings(field: str, folder: Path, max_steps: int, but_for: Container[str] = ()) -> dict[str, str]:
    """
    Compare today's settings with those of the study in a folder, which may contain none.

    Returns the changes of the arms in `but_for`. If anything else has changed, a `ValueError` names `field`, which
    gave the folder, and the settings.
    """
    settings, earlier = _settings(max_steps), _recorded(folder)
    changed = [name for name, value in settings.items() if earlier.get(name, value) != value]
    if refused := [name for name in changed if name not in but_for]:
        told = "; ".join(f"{name}: {earlier[name]}, now {settings[name]}" for name in refused)
        raise ValueError(f"{field}: {folder} holds a study with other settings ({told}). Set another folder.")
    return {name: _changes(earlier[name], settings[name]) for name in changed}


def note_settings(folder: Path, max_steps: int, old: Container[str] = ()) -> None:
    """Write today's settings next to a study, except for old arms, which keep those that they were trained with."""
    earlier = _recorded(folder)
    settings = {name: earlier[name] if name in old else value for name, value in _settings(max_steps).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _recorded(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    return json.loads(file.read_text()) if file.exists() else {}


def _settings(max_steps: int) -> dict[str, Any]:
    """Return the settings as they are read from a file."""
    settings: dict[str, Any] = {"max_steps": max_steps, "beta": BETA, "problems": PROBLEMS, "samples": SAMPLES}
    settings |= {"training": TRAINING, "evaluation": EVALUATION, "max_completion_length": MAX_COMPLETION_LENGTH}
    return json.loads(json.dumps(settings | {arm.name: _described(arm) for arm in ARMS}))


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the changes in what [`_described`] returns for an arm, with its options one by one."""
    before, after = ({**arm, **arm["options"]} for arm in (earlier, now))
    names = [name for name in {**before, **after} if name != "options" and before.get(name) != after.get(name)]
    return ", ".join(
        f"`{name}` is {after.get(name, 'the default')}, was {before.get(name, 'the default')}" for name in names
    )


def _described(arm: Arm) -> dict[str, Any]:
    """Describe how an arm is trained. Where it appears, and how often it is evaluated, may change."""
    described = {name: getattr(arm, name) for name in ("method", "options", "budget", "stages", "targets")}
    return described | {"start": arm.start.name if arm.start else None}


def run_study(
    folder: Path, jobs: list[tuple[Arm, int]], max_steps: int, done: Container[tuple[str, int]] = ()
) -> None:
    """
    Run all unfinished jobs, one after another, and the vanilla model, which is done if `done` has it with seed 0.

    Jobs that another process is running are left to it. A folder with another number of updates is refused.
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
