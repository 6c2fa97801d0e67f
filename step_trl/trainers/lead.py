"""
LEAD: correctness and length as two advantages, whose weights follow the training (arXiv 2605.09806).

Departures from GRPO:
1. The completions of a group are compared with the mean length of its correct ones.
2. Correctness and closeness to that length each have a group-normalised advantage.
3. Their weights follow what each can still gain in the batch, as a moving average.
4. The weighted sum is whitened over the tokens of the batch.
"""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

from ..advantages import (
    batch_signal,
    correctness_share,
    group_advantages,
    length_efficiency,
    length_targets,
)
from .base import EfficientReasoningTrainer
from .batch import Batch
from .lead_config import LEADConfig


class LEADTrainer(EfficientReasoningTrainer):
    """
    Trainer for LEAD.

    LEAD (arXiv 2605.09806) learns correctness and length at once, and gives more weight to the one that has more to
    gain. Changes with respect to [`~trl.GRPOTrainer`]: the advantages. The advantage of correctness is that of the
    weighted sum of the reward functions.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`LEADConfig`].

    Example:

    ```python
    from step_trl import LEADConfig, LEADTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = LEADTrainer(
        load_model(),
        args=LEADConfig("lead", max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "lead"]
    _name = "LEAD"
    _paper = {
        "title": "LEAD: Length-Efficient Adaptive and Dynamic Reasoning for Large Language Models",
        "id": "2605.09806",
        "citation": textwrap.dedent("""\
            @article{wei2026lead,
                title        = {{LEAD: Length-Efficient Adaptive and Dynamic Reasoning for Large Language Models}},
                author       = {Wei, Songtao and Li, Yi and Li, Zhikai and Hu, Xu and Ji, Yuede and Li, Guanpeng and
                                Chen, Feng and Yang, Carl and Guo, Zhichun and Li, Bingzhe},
                year         = 2026,
                eprint       = {arXiv:2605.09806},
            }
            """),
    }
    config_class = LEADConfig
    metric_prefixes = ("lead",)
    charts: ClassVar = {
        "Efficient reasoning": {
            "weight of correctness": ["lead/balance", "lead/share"],
            "target length": ["lead/target"],
            "closeness to the target": ["lead/efficiency"],
        },
    }
    args: LEADConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._balance = self.args.initial_balance

    def lengths(self, batch: Batch) -> list[int]:
        """Return the length of each of this process's completions, by default in tokens."""
        return [len(ids) for ids in batch.completion_ids]

    def credit(self, batch, advantages):
        if not batch.training:  # evaluation may have groups of one
            return advantages
        args, size = self.args, batch.num_generations
        lengths = batch.gather(self.lengths(batch)).float()
        targets = length_targets(lengths, batch.correct, size, args.least_tokens, args.most_tokens)
        efficiency = length_efficiency(lengths, targets)
        of_length = batch_signal(efficiency, batch.correct, size)
        share = correctness_share(batch_signal(batch.correct.float(), ~batch.unscorable, size), of_length)
        self._balance = args.balance_decay * self._balance + (1 - args.balance_decay) * share
        weight = max(self._balance, args.least_balance)
        both = weight * group_advantages(batch.scores, size) + (1 - weight) * group_advantages(efficiency, size)
        values = {"balance": weight, "share": share, "target": targets.mean().item(), "efficiency": of_length.mean}
        for name, value in values.items():
            self.log_metric(f"lead/{name}", value)
        return batch.whiten(batch.local(both.to(advantages))).masked_fill(batch.local(batch.unscorable), 0)

    def method_state(self) -> dict[str, Any]:
        return {"balance": self._balance}

    def load_method_state(self, state):
        self._balance = state["balance"]
