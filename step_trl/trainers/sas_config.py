"""Options of step-level advantage selection, with the symbols of the paper (arXiv 2604.24003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..advantages.step_selection import Criterion, Granularity, Selection
from ..checks import check_choices
from .base_config import EfficientReasoningConfig


@dataclass
class StepSelection:
    """
    Options of step-level advantage selection, with the paper's symbols.

    Args:
        selection_ratio (`float`, *optional*, defaults to `0.3`):
            r: the share of the steps of a correct completion that lose their advantage.
        step_delimiter (`str`, *optional*, defaults to a blank line):
            The text that ends a step.
        failed_step_advantage (`float`, *optional*, defaults to `0.0`):
            The advantage of the most confident steps of a failed completion. With `0.0`, it is given to the
            `floor(r * N)` most confident ones, the rule of the paper's later version. Any other value, such as the
            `1.0` of its earlier version, is given to the `ceil((1 - r) * N)` most confident ones.
        selection (`str`, *optional*, defaults to `"both"`):
            The completions whose steps are selected: `"both"`, `"correct"` or `"failed"`.
        criterion, granularity, selection_bug_compatible (*optional*):
            As in [`~step_trl.advantages.select_step_advantages`].
    """

    selection_ratio: float = field(default=0.3, metadata={"help": "The share r of steps that lose their advantage."})
    step_delimiter: str = field(default="\n\n", metadata={"help": "The text that ends a step."})
    failed_step_advantage: float = field(
        default=0.0, metadata={"help": "The advantage of the selected steps of failed completions."}
    )
    selection: str = field(default="both", metadata={"help": "Select on 'both', 'correct' or 'failed' completions."})
    criterion: str = field(default="confidence", metadata={"help": "Select steps by 'confidence' or at 'random'."})
    granularity: str = field(default="step", metadata={"help": "Select a whole 'step' or each 'token'."})
    selection_bug_compatible: bool = field(
        default=False, metadata={"help": "Whether to reproduce the selection of the released SAS code."}
    )

    def validate(self) -> None:
        """Check the options, and raise a `ValueError` that names the field, its value and the remedy."""
        if not 0 < self.selection_ratio < 1:
            raise ValueError(
                f"selection_ratio: {self.selection_ratio} is not between 0 and 1. Set the share of steps that lose "
                "their advantage, for example 0.3."
            )
        if not self.step_delimiter:
            raise ValueError(
                "step_delimiter: an empty string cannot end a step. Set for example a blank line, '\\n\\n'."
            )
        check_choices(self, selection=Selection, criterion=Criterion, granularity=Granularity)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of [`~step_trl.advantages.select_step_advantages`]."""
        return {
            "ratio": self.selection_ratio,
            "failed_step_advantage": self.failed_step_advantage,
            "selection": self.selection,
            "criterion": self.criterion,
            "granularity": self.granularity,
            "selection_bug_compatible": self.selection_bug_compatible,
        }


def check_loss_type(args: GRPOConfig) -> None:
    """Refuse a loss that weights whole completions by their advantage, since advantages are per token here."""
    if args.loss_type == "vespo":
        raise ValueError(
            "loss_type: 'vespo' needs one advantage per completion, but step-level selection gives one to each token. "
            "Set loss_type to 'dapo', 'grpo', 'bnpo', 'dr_grpo', 'cispo', 'sapo' or 'luspo'."
        )


@dataclass
class SASConfig(StepSelection, EfficientReasoningConfig):
    """
    Configuration of [`SASTrainer`]: the fields of [`StepSelection`], [`EfficientReasoningConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        require_end_of_thinking (`bool`, *optional*, defaults to `True`):
            As in [`EfficientReasoningConfig`], but `True` by default, as SAS is trained.
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
