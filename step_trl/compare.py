"""`step-trl report`: the tables and figures of evaluations and trainings, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from .evaluation import read_samples, summarize
from .report import (
    latex_table,
    markdown_table,
    plot_accuracy_against_tokens,
    plot_semantic_density,
    plot_training,
    plot_training_dynamics,
    read_history,
)
from .report.figures import STYLE
from .report.history import WANDB, History


ACCURACY = "rewards/math_accuracy_reward/mean"
_LENGTH = "completions/mean_length"
_POLICY = {"entropy": "entropy, nats", "kl": "KL from the reference, nats"}


def run_report(runs: Sequence[str], output_dir: Path, *, vanilla: str | None = None, accuracy: str = ACCURACY) -> None:
    """
    Compare runs: writes `results.md`, `results.tex`, `summary.csv` and `evaluation.png` of those that were evaluated,
    and `training.png` of those that were trained.

    Args:
        runs (`Sequence[str]`):
            Folders of `step-trl eval --report` or of trainings, or all that [`~step_trl.report.read_history`] takes,
            as `FOLDER` or `NAME=FOLDER`. A folder may hold both.
        output_dir (`Path`):
            Folder to write to. An earlier report there is replaced.
        vanilla (`str`, *optional*):
            Name of the run that CR and AES are relative to.
        accuracy (`str`, *optional*, defaults to `"rewards/math_accuracy_reward/mean"`):
            Metric of the trainings that is drawn with the length.
    """
    folders = _named(runs)
    samples = {name: rows for name, folder in folders.items() if len(rows := read_samples(folder))}
    if vanilla is not None and vanilla not in samples:
        raise ValueError(f"vanilla: {vanilla!r} has no samples. Choose from {', '.join(samples) or 'none'}.")
    histories = {
        name: read_history(folder) for name, folder in folders.items() if name not in samples or _was_trained(folder)
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    if samples:
        base = None if vanilla is None else samples[vanilla]
        tables = {name: summarize(rows, base) for name, rows in samples.items()}
        pd.concat(tables, names=["model"]).to_csv(output_dir / "summary.csv")
        text = markdown_table(tables, intervals=True)
        (output_dir / "results.md").write_text(text + "\n")
        (output_dir / "results.tex").write_text(latex_table(tables, intervals=True))
        _evaluation(tables, samples, output_dir / "evaluation.png")
        print(text)
    if histories:
        _trainings(histories, accuracy, output_dir / "training.png")
    print(f"See {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")


def _named(runs: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for run in runs:
        given, _, behind = run.partition("=")
        name, folder = (given, behind) if behind and not Path(run).exists() else (Path(run).name, run)
        if name in folders:
            raise ValueError(f"runs: two are called {name!r}. Give them names: NAME={folder}.")
        if not (folder.startswith(WANDB) or Path(folder).is_dir()):
            raise FileNotFoundError(f"runs: there is no folder {folder}. Give those of evaluations and trainings.")
        folders[name] = folder
    return folders


def _was_trained(folder: str) -> bool:
    """Whether a folder of samples holds a training, too."""
    return any(Path(folder).glob("trainer_state.json")) or any(Path(folder).glob("checkpoint-*"))


def _evaluation(tables: dict[str, pd.DataFrame], samples: dict[str, pd.DataFrame], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_accuracy_against_tokens(left, tables)
        plot_semantic_density(right, samples)
        figure.savefig(path)


def _trainings(histories: Mapping[str, History], accuracy: str, path: Path) -> None:
    """A panel for each training, and one for each metric of the policy that all have."""
    metrics = [key for key in _POLICY if all(any(key in entry for entry in rows) for rows in histories.values())]
    panels = len(histories) + len(metrics)
    rows = -(-panels // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        for panel, (name, history) in zip(axes, histories.items(), strict=False):
            plot_training_dynamics(panel, history, accuracy, _LENGTH)
            panel.set_title(name)
        for panel, key in zip(axes[len(histories) :], metrics, strict=False):
            plot_training(panel, histories, key, _POLICY[key])
            panel.legend()
        for panel in axes[panels:]:
            panel.remove()
        figure.savefig(path)
