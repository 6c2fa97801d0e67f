"""Add what TRL's model card lacks: the options of the method, and the last metrics of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl import GRPOConfig


FRAMEWORKS = "### Framework versions"  # TRL's heading after the method
SHARED_OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_steps",
    "beta",
    "epsilon",
    "epsilon_high",
    "loss_type",
    "scale_rewards",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "top_p",
    "seed",
)
METRICS = ("loss", "reward", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "num_tokens")


def describe_training(
    card: str,
    args: GRPOConfig,
    method_options: Mapping[str, Any],
    metric_prefixes: Sequence[str],
    log_history: list[dict[str, Any]],
) -> str:
    """
    Return TRL's model card with the options and the last metrics of its training. Servers and folders are left out.

    `method_options` are those that only the method has, and `metric_prefixes` those of its own metrics.
    """
    options = {**method_options, **{name: getattr(args, name) for name in SHARED_OPTIONS}}
    # For an enumeration, the value that is written in a recipe.
    values = {name: repr(getattr(value, "value", value)) for name, value in options.items()}
    sections = _table("Hyperparameters", "option", values)
    for name, key in (("training", "reward"), ("evaluation", "eval_reward")):
        logs = [entry for entry in log_history if key in entry]
        if logs:
            title = f"Last metrics in {name}, step {logs[-1]['step']}"
            sections += _table(title, "metric", _metrics(logs[-1], ("rewards", *metric_prefixes)))
    before, heading, after = card.partition(FRAMEWORKS)
    return f"{before.rstrip()}\n\n{sections}{heading}{after}"


def _metrics(logs: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, str]:
    starts = tuple(f"{prefix}/" for prefix in prefixes)
    return {
        key: f"{value:.4g}"
        for key, value in logs.items()
        if value is not None and ((name := key.removeprefix("eval_")) in METRICS or name.startswith(starts))
    }


def _table(title: str, column: str, values: Mapping[str, str]) -> str:
    lines = ["| `{}` | `{}` |".format(name, value.replace("|", r"\|")) for name, value in values.items()]
    return "\n".join([f"### {title}", "", f"| {column} | value |", "|---|---|", *lines, "", ""])
