"""Options of LEAD (arXiv 2605.09806)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from .base_config import EfficientReasoningConfig, check_own_advantages


@dataclass
class LEADConfig(EfficientReasoningConfig):
    """
    Configuration of [`LEADTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        shortest_target (`int`, *optional*):
            The least number of tokens that completions are compared with. By default an eighth of the longest, as the
            paper's 1,000 of 8,000.
        longest_target (`int`, *optional*):
            The largest number, which groups without a correct completion are compared with. By default
            `max_completion_length`.
        initial_balance (`float`, defaults to `0.5`), balance_decay (`float`, defaults to `0.95`):
            The weight of correctness before the first update, and how much of it stays with each update. The rest
            comes from the batch.
        least_balance (`float`, *optional*, defaults to `0.3`):
            The least weight of correctness in the advantages.
    """

    shortest_target: int | None = field(
        default=None,
        metadata={
            "help": "The least number of tokens that completions are compared with, by default 1/8 of the largest."
        },
    )
    longest_target: int | None = field(
        default=None, metadata={"help": "The largest number, by default max_completion_length."}
    )
    initial_balance: float = field(
        default=0.5, metadata={"help": "The weight of correctness before the first update."}
    )
    balance_decay: float = field(
        default=0.95, metadata={"help": "How much of the weight of correctness stays with each update."}
    )
    least_balance: float = field(default=0.3, metadata={"help": "The least weight of correctness."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("initial_balance", "balance_decay", "least_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and 1. Set, for example, 0.5.")
        if not 1 <= self.least_tokens <= self.most_tokens:
            raise ValueError(
                f"shortest_target: {self.least_tokens} is not between 1 and the longest target of "
                f"{self.most_tokens} tokens. Set less, such as the shortest length at which the model can answer."
            )
        check_own_advantages(self, "LEAD")

    @property
    def least_tokens(self) -> int:
        """Return the least length that completions are compared with."""
        return max(1, self.most_tokens // 8) if self.shortest_target is None else self.shortest_target

    @property
    def most_tokens(self) -> int:
        """Return the largest length that completions are compared with."""
        return cast("int", self.max_completion_length) if self.longest_target is None else self.longest_target

    def describe(self):
        span = f"{self.least_tokens:,} to {self.most_tokens:,} tokens"
        return [
            *super().describe(),
            f"correctness balanced with the distance from the length of correct ones ({span})",
        ]
