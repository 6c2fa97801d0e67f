"""Options of step-level advantage selection; the symbols are the paper's (arXiv 2604.24003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .base_config import EfficientReasoningConfig


@dataclass
class StepSelection:
    """
    Options of step-level advantage selection; the symbols are the paper's.

    Args:
        selection_ratio (`float`, *optional*, defaults to `0.3`):
            r: share of the steps of a correct completion that lose their advantage.
        step_delimiter (`str`, *optional*, defaults to a blank line):
            Text that closes a step.
        failed_step_advantage (`float`, *optional*, defaults to `0.0`):
            Advantage of the most confident steps of a failed completion: with `0.0` of the `floor(r * N)` most
            confident ones, the rule of the paper's later version; with any other value, such as the `1.0` of its
            earlier version, of the `ceil((1 - r) * N)` most confident ones.
        selection (`str`, *optional*, defaults to `"both"`):
            Completions to select on: `"both"`, `"correct"` or `"failed"`.
        criterion (`str`, *optional*, defaults to `"confidence"`):
            `"confidence"`, or `"random"` as a control.
        granularity (`str`, *optional*, defaults to `"step"`):
            `"step"`, or `"token"` to treat each token of the thought as a step.
        selection_bug_compatible (`bool`, *optional*, defaults to `False`):
            Reproduce the released code: all steps of correct completions lose their advantage, failed ones keep it.
    """

    selection_ratio: float = field(default=0.3, metadata={"help": "Share r of steps that lose their advantage."})
    step_delimiter: str = field(default="\n\n", metadata={"help": "Text that closes a step."})
    failed_step_advantage: float = field(
        default=0.0, metadata={"help": "Advantage of the selected steps of failed completions."}
    )
    selection: str = field(default="both", metadata={"help": "Select on 'both', 'correct' or 'failed' completions."})
    criterion: str = field(default="confidence", metadata={"help": "Select steps by 'confidence' or at 'random'."})
    granularity: str = field(default="step", metadata={"help": "Select a whole 'step' or each 'token'."})
    selection_bug_compatible: bool = field(
        default=False, metadata={"help": "Reproduce the selection of the released SAS code."}
    )

    def validate(self) -> None:
        """Raise a `ValueError` that names the field, its value and the remedy."""
        if not 0 < self.selection_ratio < 1:
            raise ValueError(
                f"selection_ratio: {self.selection_ratio} is not between 0 and 1. Set the share of steps that lose "
                "their advantage, for example 0.3."
            )
        if not self.step_delimiter:
            raise ValueError("step_delimiter: the empty text closes no step. Set for example a blank line, '\\n\\n'.")
        for name, choices in (
            ("selection", ("both", "correct", "failed")),
            ("criterion", ("confidence", "random")),
            ("granularity", ("step", "token")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known. Set one of {choices}.")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of [`~step_trl.advantages.select_step_advantages`]."""
        return {
            "ratio": self.selection_ratio,
            "failed_step_advantage": self.failed_step_advantage,
            "selection": self.selection,
            "criterion": self.criterion,
            "granularity": self.granularity,
            "selection_bug_compatible": self.selection_bug_compatible,
        }


def check_loss_type(args: GRPOConfig) -> None:
    """Advantages per token have no meaning in a loss that weighs whole completions by them."""
    if args.loss_type == "vespo":
        raise ValueError(
            "loss_type: 'vespo' weighs a completion by one advantage, step-level selection gives one to each token. "
            "Set loss_type to 'dapo', 'grpo', 'bnpo', 'dr_grpo', 'cispo', 'sapo' or 'luspo'."
        )


@dataclass
class SASConfig(StepSelection, EfficientReasoningConfig):
    """
    Configuration of [`SASTrainer`]: the fields of [`StepSelection`], [`EfficientReasoningConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        require_end_of_thinking (`bool`, *optional*, defaults to `True`):
            As in [`EfficientReasoningConfig`], with the default that SAS is trained with.
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"r": "selection_ratio"}

    require_end_of_thinking: bool = field(
        default=True, metadata={"help": "The default reward is 0 for a completion without </think>."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate()
        check_loss_type(self)

    def describe(self):
        return [*super().describe(), f"steps selected with ratio {self.selection_ratio:g}"]
