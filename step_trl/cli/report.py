"""`step-trl report`: compare evaluations and trainings in tables and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..evaluation import read_samples, summarize
from ..report import (
    evaluation_report,
    latex_table,
    markdown_table,
    read_history,
    training_report,
    whole_completions,
)
from ..report.history import WANDB, History


ACCURACY = "rewards/math_accuracy_reward/mean"


def run_report(runs: Sequence[str], output_dir: Path, *, vanilla: str | None = None, accuracy: str = ACCURACY) -> None:
    """
    Compare runs in tables and figures, as `step-trl report` does.

    Writes `results.md`, `results.tex`, `summary.csv` and `evaluation.png` for evaluated runs, and `training.png` for
    trained ones. A folder may be of both kinds.
    """
    folders = _named(runs)
    samples = {name: _ordered(rows, folder) for name, folder in folders.items() if len(rows := read_samples(folder))}
    if vanilla is not None and vanilla not in samples:
        raise ValueError(f"vanilla: {vanilla!r} has no samples. Choose from {', '.join(samples) or 'none'}.")
    histories: dict[str, History] = {}
    for name, folder in folders.items():
        try:
            histories[name] = whole_completions(read_history(folder))
        except FileNotFoundError:
            if name not in samples:
                raise
    output_dir.mkdir(parents=True, exist_ok=True)
    if samples:
        base = None if vanilla is None else samples[vanilla]
        tables = {name: summarize(rows, base) for name, rows in samples.items()}
        pd.concat(tables, names=["model"]).to_csv(output_dir / "summary.csv")
        text = markdown_table(tables, intervals=True)
        (output_dir / "results.md").write_text(text + "\n")
        (output_dir / "results.tex").write_text(latex_table(tables, intervals=True))
        evaluation_report(output_dir / "evaluation.png", tables, samples)
        print(text)
    if histories:
        training_report(output_dir / "training.png", histories, accuracy)
    print(f"See {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")


def _ordered(rows: pd.DataFrame, folder: str) -> pd.DataFrame:
    """Return samples, which are saved as they are finished, with benchmarks in the order of the evaluation."""
    settings = Path(folder) / "settings.json"
    names = list(json.loads(settings.read_text())["benchmarks"] if settings.exists() else rows["benchmark"].unique())
    return rows.sort_values("benchmark", key=lambda column: column.map(names.index), kind="stable", ignore_index=True)


def _named(runs: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for run in runs:
        given, _, behind = run.partition("=")
        name, folder = (given, behind) if behind and not Path(run).exists() else (Path(run).name, run)
        if name in folders:
            raise ValueError(f"runs: two are called {name!r}. Give them names: NAME={folder}.")
        if not (folder.startswith(WANDB) or Path(folder).is_dir()):
            raise FileNotFoundError(f"runs: there is no folder {folder}. Give folders of evaluations or trainings.")
        folders[name] = folder
    return folders
