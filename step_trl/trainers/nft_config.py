"""Options of NFT (arXiv 2505.18116)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..losses import check_loss_options
from .base_config import EfficientReasoningConfig


@dataclass
class NFTConfig(EfficientReasoningConfig):
    """
    Configuration of [`NFTTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    NFT differs from Dr.GRPO only where the policy has moved since the rollout: set `num_iterations` above 1, or
    `steps_per_generation` above `gradient_accumulation_steps`.

    The default of `loss_type` gives Dr.GRPO's normaliser, which uses a constant number of tokens, as the paper's does.

    Args:
        clamp_negative, negative_weight, omega, sequence_level (*optional*):
            As in [`~step_trl.losses.nft_loss`]. The paper suggests a `negative_weight` of 0.5 for a 32B model.
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"epsilon": "clamp_negative", "omega": "omega"}

    clamp_negative: float = field(default=1.0, metadata={"help": "The lower bound on a failed token's ratio."})
    negative_weight: float = field(default=1.0, metadata={"help": "The weight of failed completions; 0 is RFT."})
    omega: int = field(default=1, metadata={"help": "The group weight: 0, 1 (as Dr.GRPO) or 2 (as GRPO)."})
    sequence_level: bool = field(default=False, metadata={"help": "Whether ratios are computed per completion."})
    loss_type: str = field(default="dr_grpo", metadata={"help": "The loss's normaliser, see GRPOConfig."})
    scale_rewards: str = field(
        default="none", metadata={"help": "How logged advantages are scaled; no effect on training."}
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Whether to multiply the KL term by the ratio, see GRPOConfig. NFT sets ratios to 1."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_loss_options(self)
        if not self.clamp_negative > 0:
            raise ValueError(f"clamp_negative: {self.clamp_negative} is not positive. Set the paper's 1.0.")
        if self.negative_weight < 0:
            raise ValueError(f"negative_weight: {self.negative_weight} is negative. Set 0.0 for RFT, 1.0 for NFT.")
        if self.omega not in (0, 1, 2):
            raise ValueError(f"omega: {self.omega!r} is not known. Set 0, 1 or 2.")
        if self.length_reward is not None:
            raise ValueError(
                f"length_reward: {self.length_reward!r} would have no effect: NFT only uses which completions are "
                "correct. Leave it out."
            )

    def describe(self):
        weight = ("1", "1 - r", "sqrt((1 - r) / r)")[self.omega]
        name = "NFT" if self.negative_weight else "RFT"
        return [*super().describe(), f"{name} loss with groups weighted by {weight}"]
