"""
NFT: negative-aware fine-tuning (arXiv 2505.18116).

Departures from GRPO:
1. The old policy is split by the group's share r of correct completions: r * positive + (1 - r) * negative.
2. Loss: the negative log-likelihood of correct completions under the policy, and of failed ones under the negative
   policy that the policy implies, weighted by omega(r). Advantages have no part in it.
"""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

from ..losses import correct_rates, loss_as_advantages, nft_loss, nft_statistics
from .base import EfficientReasoningTrainer
from .batch import loss_mask
from .nft_config import NFTConfig


class NFTTrainer(EfficientReasoningTrainer):
    """
    Trainer for NFT.

    NFT (arXiv 2505.18116) shows that supervised learning can learn from failures, too. Where the policy is the one
    that has sampled, its gradient is Dr.GRPO's (`omega=1`) or GRPO's (`omega=2`); it differs in later updates on the
    same rollouts. Changes with respect to [`~trl.GRPOTrainer`]: the loss.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` an [`NFTConfig`]. Reward functions after the
    first one are only logged.
    """

    _tag_names = ["trl", "nft"]
    _name = "NFT"
    _paper = {
        "title": "Bridging Supervised Learning and Reinforcement Learning in Math Reasoning",
        "id": "2505.18116",
        "citation": textwrap.dedent("""\
            @article{chen2025nft,
                title        = {{Bridging Supervised Learning and Reinforcement Learning in Math Reasoning}},
                author       = {Chen, Huayu and Zheng, Kaiwen and Zhang, Qinsheng and Cui, Ganqu and Cui, Yin and
                                Ye, Haotian and Lin, Tsung-Yi and Liu, Ming-Yu and Zhu, Jun and Wang, Haoxiang},
                year         = 2025,
                eprint       = {arXiv:2505.18116},
            }
            """),
    }
    config_class = NFTConfig
    metric_prefixes = ("nft",)
    charts: ClassVar = {
        "Is it healthy?": {
            "groups that teach": ["nft/kept_groups"],
            "ratio of failed tokens": ["nft/ratio_neg_mean"],
            "failed tokens at the clamp": ["nft/neg_clamped_frac"],
            "loss": ["nft/loss"],
        },
    }
    args: NFTConfig

    def credit(self, batch, advantages):
        batch.inputs["correct_rate"] = batch.local(correct_rates(batch.correct, batch.groups, ~batch.unscorable))
        return advantages

    def before_loss(self, inputs, logps):
        args, mask = self.args, loss_mask(inputs)
        old_logps = inputs.get("old_per_token_logps", logps)
        known = (old_logps, inputs["correct"], inputs["correct_rate"], args.clamp_negative)
        how: dict[str, Any] = {"mask": mask, "sequence_level": args.sequence_level}
        loss = loss_as_advantages(
            inputs, logps, lambda leaf: nft_loss(leaf, *known, args.negative_weight, args.omega, **how)
        )
        statistics = nft_statistics(logps, *known, **how) | {"loss": (loss, mask.bool())}
        self.log_masked_means({f"nft/{name}": value for name, value in statistics.items()})
