"""Options of SEED-GRPO (arXiv 2505.12346)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..advantages.semantic_entropy import Entropy, Estimator, Form
from ..checks import check_choices
from .base_config import EfficientReasoningConfig


@dataclass
class SEEDGRPOConfig(EfficientReasoningConfig):
    """
    Configuration of [`SEEDGRPOTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    The defaults of `loss_type` and `scale_rewards` are those of Dr.GRPO, which the paper builds on.

    Args:
        alpha (`float`, *optional*, defaults to `0.02`):
            How strongly disagreement weakens the update. With the paper's 0.02, the factor is between 0.98 and 1; with
            1.0, a group whose answers all differ is not trained on.
        f (`str`, *optional*, defaults to `"linear"`), gamma (`float`, *optional*, defaults to `2.0`):
            The form of the factor, `"linear"`, `"exponential"`, `"focal"` or `"inverse"`, and the exponent of
            `"focal"`, see [`~step_trl.advantages.seed_scale`].
        estimator (`str`, *optional*, defaults to `"count"`), entropy (`str`, *optional*, defaults to `"eq5"`):
            How the masses of the answers are estimated, `"count"` or `"likelihood"`, and the entropy that is computed
            from them, `"eq5"` or `"shannon"`, see [`~step_trl.advantages.semantic_entropy`].
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"alpha": "alpha", "f": "f"}

    alpha: float = field(default=0.02, metadata={"help": "How strongly disagreement weakens the update."})
    f: Form = field(
        default="linear", metadata={"help": "The form of the factor: 'linear', 'exponential', 'focal' or 'inverse'."}
    )
    gamma: float = field(default=2.0, metadata={"help": "The exponent of f='focal'."})
    estimator: Estimator = field(default="count", metadata={"help": "The answers' masses: 'count' or 'likelihood'."})
    entropy: Entropy = field(default="eq5", metadata={"help": "The entropy of the masses: 'eq5' or 'shannon'."})
    loss_type: str = field(default="dr_grpo", metadata={"help": "The loss type, see GRPOConfig."})
    scale_rewards: str = field(default="none", metadata={"help": "How advantages are scaled, see GRPOConfig."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative. Set at least 0.")
        check_choices(self, f=Form, estimator=Estimator, entropy=Entropy)

    def describe(self):
        words = f"advantages scaled by a {self.f} factor of the entropy of answers ({self.estimator}, {self.entropy})"
        return [*super().describe(), f"{words} with alpha {self.alpha:g}"]
