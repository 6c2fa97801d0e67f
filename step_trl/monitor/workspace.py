"""A Weights & Biases workspace that shows the most important plots first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from .trackers import NUM_TRACES, TABLE, TRACE


if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

# Maps the title of a section to its plots: their titles, each with the keys to draw.
Charts = Mapping[str, Mapping[str, Iterable[str]]]
CHARTS: Charts = {
    "Efficient reasoning": {
        "accuracy of rollouts": ["rewards/math_accuracy_reward/mean"],
        "tokens per completion": ["completions/mean_length", "completions/mean_terminated_length"],
        "reward": ["reward", "reward_std"],
        "skipped thoughts": ["completions/skip_ratio"],
    },
    "Is it healthy?": {
        "groups without a signal": ["frac_reward_zero_std"],
        "clipped completions": ["completions/clipped_ratio"],
        "entropy": ["entropy"],
        "KL": ["kl"],
        "gradient norm": ["grad_norm"],
    },
}


class Charted(Protocol):
    """An object with its own charts: a trainer or its class."""

    charts: Charts


def merged_charts(methods: Iterable[Charted]) -> dict[str, dict[str, list[str]]]:
    """Return the charts of every training and of some methods. Plots with the same title are merged."""
    merged: dict[str, dict[str, list[str]]] = {}
    for charts in (CHARTS, *(method.charts for method in methods)):
        for section, plots in charts.items():
            for plot, keys in plots.items():
                drawn = merged.setdefault(section, {}).setdefault(plot, [])
                drawn += [key for key in keys if key not in drawn]
    return merged


def wandb_workspace(entity: str, project: str, methods: Iterable[Charted] = (), name: str = "step_trl") -> Workspace:
    """
    Return a workspace for runs of the trainers. Nothing is sent before its `save()`.

    Args:
        entity (`str`), project (`str`), name (`str`, *optional*, defaults to `"step_trl"`):
            The entity and the project of the runs, and the name of the workspace.
        methods (`Iterable` of trainers or their classes, *optional*):
            The methods whose own charts are also shown.

    Example:

    ```python
    >>> from step_trl import StepGRPOTrainer
    >>> workspace = wandb_workspace("my-team", "efficient-reasoning", [StepGRPOTrainer])
    >>> [section.name for section in workspace.sections]
    ['Efficient reasoning', 'Completions', 'Is it healthy?']
    ```
    """
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces.workspaces import Section, Workspace

    x = "train/global_step"
    sections = [
        Section(
            name=title,
            is_open=True,
            panels=[
                panels.LinePlot(title=plot, x=x, y=[f"train/{key}" for key in keys]) for plot, keys in plots.items()
            ],
        )
        for title, plots in merged_charts(methods).items()
    ]
    completions = Section(
        name="Completions",
        is_open=True,
        panels=[
            panels.WeavePanelSummaryTable(table_name=TABLE),
            panels.MediaBrowser(media_keys=[f"{TRACE}-{number}" for number in range(1, NUM_TRACES + 1)]),
        ],
    )
    return Workspace(entity=entity, project=project, name=name, sections=[sections[0], completions, *sections[1:]])
