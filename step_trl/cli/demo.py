"""The main job on the embedded testbed: evaluate, train with Step-GRPO and with SAS, evaluate again, compare."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import testbed
from ..evaluation import evaluate, summarize
from ..report import demo_report
from ..rollout import Rollout
from ..rollout.engines import VLLMServer
from ..trainers import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer


MAX_COMPLETION_LENGTH = 512
# Evaluation as in the Step-GRPO paper.
EVALUATION: dict[str, Any] = {"max_tokens": MAX_COMPLETION_LENGTH, "temperature": 0.6, "top_p": 0.9}
# What both trainers share: 64 completions per update, 8 per problem. A tiny model and few updates, hence the learning
# rate; it was chosen on evaluation problems that the demo does not use (benchmarks/README.md).
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "max_steps": 40,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
}
REWARD = "rewards/math_accuracy_reward/mean"


def step_grpo_config(output_dir: str, **options) -> StepGRPOConfig:
    """Return the configuration of Step-GRPO with the paper's options, for the testbed."""
    return StepGRPOConfig(output_dir, **TRAINING | {"max_completion_length": MAX_COMPLETION_LENGTH} | options)


def sas_config(output_dir: str, **options) -> SASConfig:
    """Return the configuration of SAS with its defaults, for completions of about the vanilla model's mean length."""
    return SASConfig(output_dir, **TRAINING | {"max_completion_length": 224} | options)


def evaluate_testbed(model, tokenizer, name: str, problems: range) -> pd.DataFrame:
    """Return the rows of [`~step_trl.evaluation.evaluate`] on the problems with these indices in each split."""
    splits = {split: testbed.load_dataset(split) for split in testbed.EVALUATION_SPLITS}
    benchmarks = {split: rows.select(problems) for split, rows in splits.items()}
    total, started, tokens = sum(map(len, benchmarks.values())), time.monotonic(), 0
    # In a log file, a line now and then is enough. On a terminal, the bar should move.
    pause = 0.1 if sys.stderr.isatty() else 15
    with tqdm(total=total, desc=f"evaluate {name}", unit="problem", mininterval=pause) as bar:

        def on_sample(rollout: Rollout) -> None:
            nonlocal tokens
            tokens += rollout.sampled_tokens
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            bar.update()

        return evaluate(model, benchmarks, tokenizer=tokenizer, on_sample=on_sample, **EVALUATION)


def set_aside(folder: Path) -> None:
    """Rename an earlier run to the first free `NAME.1`, `NAME.2`, ..., so that a new run never overwrites it."""
    if folder.exists():
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


@contextmanager
def rollouts_on(engine: str, log_file: Path) -> Iterator[dict[str, Any]]:
    """Yield the training options for rollouts in process (`"transformers"`) or on a `"vllm"` server started here."""
    if engine == "transformers":
        yield {}
        return
    with VLLMServer(testbed.MODEL_DIR, max_model_len=1024, log_file=log_file) as server:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        yield options | {"weight_sync": "disk"}


def run_demo(
    output_dir: Path = Path("runs/demo"), problems: int = 64, engine: str = "transformers", **options
) -> dict:
    """
    Train with each method, compare the models, and return what is written to `summary.json`.

    Also writes `samples.parquet`, `report.png` and, for each method, the model and the trainer state. The arguments
    are the options of `step-trl demo`; further `options` are fields of the training configurations.
    """
    if problems < 1:
        raise ValueError(f"problems: {problems} leaves none to evaluate on. Set at least 1.")
    started = time.monotonic()
    set_aside(output_dir)
    output_dir.mkdir(parents=True)
    tokenizer, train_dataset = testbed.load_tokenizer(), testbed.load_dataset("train")
    vanilla: Any = testbed.load_model()
    if torch.cuda.is_available() and not options.get("use_cpu"):
        vanilla.cuda()  # where the trainers put their models, so that all are evaluated in the same way
    samples = {"vanilla": evaluate_testbed(vanilla, tokenizer, "vanilla", range(problems))}
    histories = {}
    for name, trainer_class, config in (
        ("step_grpo", StepGRPOTrainer, step_grpo_config),
        ("sas", SASTrainer, sas_config),
    ):
        with rollouts_on(engine, output_dir / "vllm.log") as engine_options:
            trainer = trainer_class(
                testbed.load_model(),
                args=config(str(output_dir / name), **engine_options | options),
                train_dataset=train_dataset,
                processing_class=tokenizer,
            )
            trainer.train()
        trainer.save_model()
        trainer.save_state()  # with the curves of the report
        histories[name] = trainer.state.log_history
        samples[name] = evaluate_testbed(trainer.model, tokenizer, name, range(problems))
    tables = {name: summarize(rows, samples["vanilla"]) for name, rows in samples.items()}
    measures = ["accuracy", "tokens", "steps", "cr", "aes"]
    summary = {name: table.loc["overall", measures].astype(float).to_dict() for name, table in tables.items()}
    pd.concat(samples, names=["model"]).reset_index(level=0).to_parquet(output_dir / "samples.parquet")
    demo_report(output_dir / "report.png", tables, histories, REWARD)
    result = {**summary, "seconds": round(time.monotonic() - started, 1)}
    (output_dir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(pd.concat(tables, names=["model"])[measures].round(3).to_string())
    print(f"\n{result['seconds']:.0f} seconds; see {output_dir / 'summary.json'} and {output_dir / 'report.png'}")
    return result
