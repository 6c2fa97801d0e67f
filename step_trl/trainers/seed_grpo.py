"""
SEED-GRPO: groups that disagree move the policy less (arXiv 2505.12346).

Departures from GRPO:
1. The completions of a group are clustered by their final answers.
2. The semantic entropy SE of a group is that of its clusters (eq. 5).
3. Advantages are multiplied by f(alpha * SE / log(G)), which is 1 where all answers agree.
"""

from __future__ import annotations

import textwrap
from typing import ClassVar

import torch
from accelerate.utils import gather_object

from ..advantages import cluster_answers, seed_scale, semantic_entropy
from ..rewards import extract_answers
from .base import EfficientReasoningTrainer
from .batch import Batch, loss_mask
from .seed_grpo_config import SEEDGRPOConfig


class SEEDGRPOTrainer(EfficientReasoningTrainer):
    """
    Trainer for SEED-GRPO.

    SEED-GRPO (arXiv 2505.12346) takes disagreement between the answers of a group as a sign that the problem is beyond
    the model, and updates the policy less on it. Changes with respect to [`~trl.GRPOTrainer`]: a factor on the
    advantages.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`SEEDGRPOConfig`].
    """

    _tag_names = ["trl", "seed-grpo"]
    _name = "SEED-GRPO"
    _paper = {
        "title": "SEED-GRPO: Semantic Entropy Enhanced GRPO for Uncertainty-Aware Policy Optimization",
        "id": "2505.12346",
        "citation": textwrap.dedent("""\
            @article{chen2025seedgrpo,
                title        = {{SEED-GRPO: Semantic Entropy Enhanced GRPO for Uncertainty-Aware Policy Optimization}},
                author       = {Chen, Minghan and Chen, Guikun and Wang, Wenguan and Yang, Yi},
                year         = 2025,
                eprint       = {arXiv:2505.12346},
            }
            """),
    }
    config_class = SEEDGRPOConfig
    metric_prefixes = ("seed",)
    charts: ClassVar = {
        "Efficient reasoning": {
            "semantic entropy": ["seed/entropy"],
            "answers per group": ["seed/clusters"],
            "factor on the advantages": ["seed/scale"],
        },
    }
    args: SEEDGRPOConfig

    def credit(self, batch, advantages):
        if not batch.training:  # evaluation may have groups of one
            return advantages
        args, size = self.args, batch.num_generations
        closed = args.require_end_of_thinking  # as in the default reward
        answers = gather_object(extract_answers(batch.completions, require_end_of_thinking=closed))
        clusters = cluster_answers(answers, size).to(advantages.device)
        logps = self._mean_logps(batch) if args.estimator == "likelihood" else None
        entropy = semantic_entropy(clusters, size, logps, args.estimator, args.entropy)
        scale = seed_scale(entropy, size, args.alpha, args.f, args.gamma)
        answers_per_group = clusters.view(-1, size).amax(dim=1) + 1
        for name, values in (("entropy", entropy), ("scale", scale), ("clusters", answers_per_group)):
            self.log_metric(f"seed/{name}", values.float().mean().item())
        return advantages * batch.local(scale).to(advantages.dtype)

    def _mean_logps(self, batch: Batch) -> torch.Tensor:
        """Return the mean log-probability `(B_global,)` of the tokens of each completion."""
        mask = loss_mask(batch.inputs)
        logps = torch.where(mask.bool(), self.old_logps(batch), 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return batch.gather(logps)
