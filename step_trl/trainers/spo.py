"""
SPO: segments of a completion are credited with the change in value that they bring (arXiv 2505.23564).

Departures from GRPO:
1. Completions are cut before some of their uncertain tokens.
2. The value of a cut is the mean reward of completions that are sampled from there.
3. Advantage of a segment: the value at its end minus that at its start, whitened over the batch.
4. Tokens that the policy was certain of are left out of the loss.
"""

from __future__ import annotations

import textwrap
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ..advantages import moments, whiten
from ..losses import uncertain_tokens, within_ratio_limits
from .base import EfficientReasoningTrainer
from .batch import loss_mask
from .spo_chain import SegmentChain
from .spo_config import SPOConfig
from .spo_tree import SegmentTree


class SPOTrainer(EfficientReasoningTrainer):
    """
    Trainer for SPO-chain.

    SPO (arXiv 2505.23564) estimates the value of a prefix by completions that are sampled from it, and credits each
    segment with the change in value. Changes with respect to [`~trl.GRPOTrainer`]: the advantages, one for each token,
    and which tokens are in the loss.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` an [`SPOConfig`], except for `tools` and
    `rollout_func`. A completion or continuation that does not end within `max_completion_length` has a reward of 0.

    Example:

    ```python
    from step_trl import SPOConfig, SPOTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = SPOTrainer(
        load_model(),
        args=SPOConfig("spo", value_samples=4, max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "spo"]
    _name = "SPO"
    _paper = {
        "title": "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language "
        "Models",
        "id": "2505.23564",
        "citation": textwrap.dedent("""\
            @article{guo2025spo,
                title        = {{Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large
                                Language Models}},
                author       = {Guo, Yiran and Xu, Lijie and Liu, Jie and Ye, Dan and Qiu, Shuang},
                year         = 2025,
                eprint       = {arXiv:2505.23564},
            }
            """),
    }
    config_class = SPOConfig
    metric_prefixes = ("spo",)
    charts: ClassVar = {
        "Is it healthy?": {
            "segments per completion": ["spo/segments"],
            "spread of values": ["spo/value_std"],
            "tokens left out of the loss": ["spo/masked_frac"],
            "sampled for values, per token": ["spo/cost"],
        },
    }
    args: SPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_own_rollouts()
        self._segments = SegmentTree(self.args) if self.args.structure == "tree" else SegmentChain(self.args)

    def _headline(self):
        if self.args.structure == "chain":
            return super()._headline()
        return {"accuracy": "spo/leaves/reward", "tokens": "spo/leaves/length"}

    def sample(self, batch):
        return self._segments.sample(self, batch)

    def credit(self, batch, advantages):
        if not batch.training:
            return advantages
        rows = self._segments.advantages(self, batch)
        responses, mask = loss_mask(batch.inputs).bool(), self.args.probability_mask
        in_loss = responses if mask is None else responses & uncertain_tokens(self.old_logps(batch), mask)
        self.log_masked_means({"spo/masked_frac": ((~in_loss).float(), responses)})
        raw = pad_sequence([*rows, torch.zeros(in_loss.size(1))], batch_first=True)[:-1].to(advantages)
        counted = self._total_moments(raw, in_loss)
        if not counted[0]:
            counted = self._total_moments(raw, responses)
        return whiten(raw, counted).masked_fill(batch.local(batch.unscorable)[:, None], 0)

    def before_loss(self, inputs, logps):
        old_logps = inputs.get("old_per_token_logps")
        # Without old log-probabilities all ratios are 1, and an evaluation has TRL's advantages, one per completion.
        if old_logps is not None and self.model.training:
            kept = within_ratio_limits(logps, old_logps, loss_mask(inputs), self.args.max_mean_ratio)
            inputs["advantages"] = inputs["advantages"] * kept
            self.log_masked_means({"spo/skipped": ((~kept).float(), loss_mask(inputs).bool())})

    def method_state(self):
        return self._segments.state_dict()

    def load_method_state(self, state):
        self._segments.load_state_dict(state)

    def _total_moments(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the [`~step_trl.advantages.moments`] of the masked values of all processes."""
        return self.accelerator.reduce(moments(values, mask), reduction="sum")
