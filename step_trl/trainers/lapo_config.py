"""Options of LAPO (arXiv 2507.15758)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .base_config import EfficientReasoningConfig


LENGTHS_FILE = "lapo_lengths.json"


@dataclass
class LAPOConfig(EfficientReasoningConfig):
    """
    Configuration of [`LAPOTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        lapo_stage (`str`, *optional*, defaults to `"discovery"`):
            `"discovery"` finds the lengths of solutions, and `"internalization"` teaches the model to state them. The
            stage's reward is the `length_reward`; `length_reward_weight` and `length_reward_options` apply to it.
        lapo_lengths (`str`, *optional*):
            The file with the lengths that the first stage found, for the second one. By default, `lapo_lengths.json`
            in the model's folder, where the first stage saves it.
    """

    _OWN_LENGTH_REWARDS = ("lapo_discovery", "lapo_internalization")

    lapo_stage: str = field(default="discovery", metadata={"help": "The stage: 'discovery' or 'internalization'."})
    lapo_lengths: str | None = field(default=None, metadata={"help": "The lengths that LAPO's first stage saved."})

    def __post_init__(self):
        if self.lapo_stage not in ("discovery", "internalization"):
            raise ValueError(f"lapo_stage: {self.lapo_stage!r} is not known. Set 'discovery' or 'internalization'.")
        stage_reward = f"lapo_{self.lapo_stage}"
        if self.length_reward not in (None, stage_reward):
            raise ValueError(
                f"length_reward: {self.length_reward!r} would replace LAPO's own. Leave it out, or use "
                "EfficientReasoningTrainer (trainer: grpo)."
            )
        self.length_reward = stage_reward
        super().__post_init__()

    def lengths_file(self, model: str) -> str:
        """
        Return the file of the lengths that the first stage found: `lapo_lengths`, or the one in the model's folder.

        Raises:
            `ValueError`: If there is no such file.
        """
        file = self.lapo_lengths or os.path.join(model, LENGTHS_FILE)
        if not os.path.isfile(file):
            raise ValueError(
                f"lapo_lengths: there is no file {file}. Train a model with lapo_stage='discovery' first, and start "
                "from it, or set the file."
            )
        return file

    def check_start(self, model):
        if self.lapo_stage == "internalization":
            self.lengths_file(model)
