"""A Weights & Biases workspace in which the plots that matter come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .trackers import NUM_TRACES, TABLE, TRACE


if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

# Title of a section to titles of its plots, each with the keys that it draws. A key that a method does not log is
# an empty line.
SECTIONS: dict[str, dict[str, list[str]]] = {
    "Efficient reasoning": {
        "accuracy of rollouts": ["rewards/math_accuracy_reward/mean"],
        "tokens per completion": ["completions/mean_length", "completions/mean_terminated_length"],
        "steps per completion": ["step_grpo/steps/mean", "step_grpo/steps/correct_mean", "sas/steps/mean"],
        "early exits": ["step_grpo/exit_rate"],
        "reward": ["reward", "reward_std"],
        "confidence of probes, of selected steps": [
            *("step_grpo/confidence/mean", "sas/confidence/changed", "sas/confidence/kept"),
        ],
    },
    "Is it healthy?": {
        "groups without a signal": ["frac_reward_zero_std"],
        "clipped completions": ["completions/clipped_ratio"],
        "entropy": ["entropy"],
        "KL": ["kl"],
        "gradient norm": ["grad_norm"],
        "advantages changed by SAS": [
            *("sas/tokens_zeroed/correct", "sas/tokens_zeroed/failed", "sas/tokens_rewarded/failed"),
        ],
    },
}


def wandb_workspace(entity: str, project: str, name: str = "step_trl") -> Workspace:
    """
    A workspace for runs of the trainers. Nothing is sent before its `save()`.

    Args:
        entity (`str`), project (`str`):
            Where the runs are.
        name (`str`, *optional*, defaults to `"step_trl"`):
            Of the workspace.

    Returns:
        [`wandb_workspaces.workspaces.Workspace`]

    Example:

    ```python
    >>> workspace = wandb_workspace("my-team", "efficient-reasoning")
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
        for title, plots in SECTIONS.items()
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
