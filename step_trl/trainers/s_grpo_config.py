"""Options of S-GRPO (arXiv 2505.07686)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .step_grpo_config import StepGRPOConfig


@dataclass
class SGRPOConfig(StepGRPOConfig):
    """
    Configuration of [`SGRPOTrainer`]: the fields of [`StepGRPOConfig`], with S-GRPO's defaults.

    Step-GRPO's probe options have no effect: the completions of a group exit one thought at random positions.

    Args:
        length_reward (`str`, *optional*, defaults to `"s_grpo"`):
            The reward that halves with each correct answer of a group, see [`~step_trl.rewards.s_grpo_reward`].
        accuracy_weight, step_reward, format_reward, scale_rewards (*optional*):
            As in [`StepGRPOConfig`] and [`~trl.GRPOConfig`], but 1.0, `False`, `False` and `"none"` by default.
    """

    _OWN_LENGTH_REWARDS = ("s_grpo",)

    length_reward: str | None = field(
        default="s_grpo",
        metadata={"help": "The name of a reward for short completions that is added to the correctness."},
    )
    accuracy_weight: float = field(default=1.0, metadata={"help": "The weight of accuracy."})
    step_reward: bool = field(default=False, metadata={"help": "Whether to use Step-GRPO's efficiency term."})
    format_reward: bool = field(default=False, metadata={"help": "Whether to use Step-GRPO's format term."})
    scale_rewards: str = field(default="none", metadata={"help": "How advantages are scaled, see GRPOConfig."})

    def __post_init__(self, serial_group):
        super().__post_init__(serial_group)
        if not self.truncated_rollout:
            raise ValueError("truncated_rollout: S-GRPO needs its exits. Leave it at True, or use StepGRPOTrainer.")

    @staticmethod
    def whole_groups(options):
        return True

    @property
    def samples_ahead(self):
        return False

    def describe(self):
        return ["groups are exits from one thought", *self._describe_reward()]

    def _describe_reward(self) -> list[str]:
        return [f"reward {self.accuracy_weight:g} accuracy", *self._describe_length_reward()]
