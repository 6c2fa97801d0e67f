"""What TRL's model card does not say: options of the method, and how the training ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from trl import GRPOTrainer

from ..trainers.base_config import EfficientReasoningConfig


FRAMEWORKS = "### Framework versions"  # TRL's heading behind the method
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
LENGTH_REWARD_OPTIONS = ("length_reward", "length_reward_weight", "length_reward_options")
METRICS = ("loss", "reward", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "num_tokens")
METRIC_PREFIXES = ("rewards/", "step_grpo/", "sas/")


class ModelCardTrainer(GRPOTrainer):
    """Adds to the model card that TRL writes with each checkpoint and push."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # TRL's
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            path = Path(cast("str", self.args.output_dir)) / "README.md"
            args = cast("EfficientReasoningConfig", self.args)
            card = path.read_text(encoding="utf-8")
            path.write_text(describe_training(card, args, self.state.log_history), encoding="utf-8")


def describe_training(card: str, args: EfficientReasoningConfig, log_history: list[dict[str, Any]]) -> str:
    """
    A model card with the options and the last metrics of its training.

    Args:
        card (`str`):
            As TRL writes it.
        args ([`EfficientReasoningConfig`]):
            Options. Servers and folders are left out.
        log_history (`list[dict]`):
            What the trainer has logged so far.
    """
    sections = _table("Hyperparameters", "option", _options(args))
    for name, key in (("training", "reward"), ("evaluation", "eval_reward")):
        logs = [entry for entry in log_history if key in entry]
        if logs:
            sections += _table(f"Last metrics in {name}, step {logs[-1]['step']}", "metric", _metrics(logs[-1]))
    before, heading, after = card.partition(FRAMEWORKS)
    return f"{before.rstrip()}\n\n{sections}{heading}{after}"


def _options(args: EfficientReasoningConfig) -> Iterator[tuple[str, str]]:
    shared = {field.name for field in fields(EfficientReasoningConfig)}
    names = [field.name for field in fields(args) if field.name not in shared]
    names += LENGTH_REWARD_OPTIONS if args.length_reward is not None else ()
    for name in (*names, *SHARED_OPTIONS):
        value = getattr(args, name)
        yield name, repr(getattr(value, "value", value))  # of an enumeration, what is written in a recipe


def _metrics(logs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in logs.items():
        name = key.removeprefix("eval_")
        if value is not None and (name in METRICS or name.startswith(METRIC_PREFIXES)):
            yield key, f"{value:.4g}"


def _table(title: str, column: str, rows: Iterator[tuple[str, str]]) -> str:
    lines = ["| `{}` | `{}` |".format(name, value.replace("|", r"\|")) for name, value in rows]
    return "\n".join([f"### {title}", "", f"| {column} | value |", "|---|---|", *lines, "", ""])
