"""Options of DLER (arXiv 2510.15110)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base_config import EfficientReasoningConfig, check_own_advantages


@dataclass
class DLERConfig(EfficientReasoningConfig):
    """
    Configuration of [`DLERTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    `max_completion_length` is the only length penalty: set it to the length that is wanted. The defaults of
    `epsilon_high` and `delta` (the dual clip) are the paper's.

    Args:
        stop_factor (`float`, *optional*, defaults to `0.1`):
            The factor on the reward of a completion that was cut off. Reward functions should not return negative
            values, which it would make less bad.
        correct_bonus (`float`, *optional*, defaults to `0.1`):
            What is added to the advantage of a completion whose reward is at least 1.
        drop_equal_groups (`bool`, *optional*, defaults to `True`):
            Whether groups whose rewards are all equal are left out of the loss. The paper samples others in their
            place; here, the batch becomes smaller.
    """

    stop_factor: float = field(default=0.1, metadata={"help": "The factor on rewards of cut-off completions."})
    correct_bonus: float = field(
        default=0.1, metadata={"help": "What is added to the advantage where the reward is at least 1."}
    )
    drop_equal_groups: bool = field(
        default=True, metadata={"help": "Whether groups with equal rewards are left out of the loss."}
    )
    epsilon_high: float | None = field(default=0.28, metadata={"help": "The upper clip, see GRPOConfig."})
    delta: float | None = field(
        default=10.0, metadata={"help": "The bound of the ratio where the advantage is negative, see GRPOConfig."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.stop_factor <= 1:
            raise ValueError(f"stop_factor: {self.stop_factor} is not between 0 and 1. Set the paper's 0.1.")
        if self.correct_bonus < 0:
            raise ValueError(f"correct_bonus: {self.correct_bonus} is negative. Set 0 for none.")
        check_own_advantages(self, "DLER")

    def describe(self):
        groups = ", groups with equal rewards left out" * self.drop_equal_groups
        return [*super().describe(), f"rewards whitened over the batch{groups}; truncation at the length limit"]
