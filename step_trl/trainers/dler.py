"""
DLER: truncation as the only length penalty, with rewards normalised over the batch (arXiv 2510.15110).

Departures from GRPO:
1. The reward of a completion that was cut off is reduced.
2. Groups with equal rewards are left out of the loss.
3. Rewards less their group's mean are whitened over the tokens of the batch, not scaled within the group.
4. Completions with a full reward have a bonus.
"""

from __future__ import annotations

import textwrap
from typing import ClassVar

import torch

from ..advantages import centred_rewards
from .base import EfficientReasoningTrainer
from .dler_config import DLERConfig


class DLERTrainer(EfficientReasoningTrainer):
    """
    Trainer for DLER.

    DLER (arXiv 2510.15110) shortens thoughts by nothing but a tight limit on the length, and keeps accuracy by how it
    optimises: rewards are normalised over the batch, the upper clip is higher, and groups without a signal are left
    out. Changes with respect to [`~trl.GRPOTrainer`]: the advantages, and which completions are in the loss.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`DLERConfig`].

    Example:

    ```python
    from step_trl import DLERConfig, DLERTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = DLERTrainer(
        load_model(),
        args=DLERConfig("dler", max_completion_length=160, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "dler"]
    _name = "DLER"
    _paper = {
        "title": "DLER: Doing Length pEnalty Right - Incentivizing More Intelligence per Token via Reinforcement "
        "Learning",
        "id": "2510.15110",
        "citation": textwrap.dedent("""\
            @article{liu2025dler,
                title        = {{DLER: Doing Length pEnalty Right - Incentivizing More Intelligence per Token via
                                Reinforcement Learning}},
                author       = {Liu, Shih-Yang and Dong, Xin and Lu, Ximing and Diao, Shizhe and Liu, Mingjie and
                                Chen, Min-Hung and Yin, Hongxu and Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and
                                Choi, Yejin and Kautz, Jan and Molchanov, Pavlo},
                year         = 2025,
                eprint       = {arXiv:2510.15110},
            }
            """),
    }
    config_class = DLERConfig
    metric_prefixes = ("dler",)
    charts: ClassVar = {
        "Is it healthy?": {
            "completions cut off": ["dler/cut_off"],
            "groups left out": ["dler/dropped_groups"],
        },
    }
    args: DLERConfig

    def credit(self, batch, advantages):
        if not batch.training:  # evaluation may have groups of one
            return advantages
        args = self.args
        ended = batch.gather([ids[-1] in self.eos_token_ids for ids in batch.completion_ids])
        rewards = torch.where(ended, batch.scores, args.stop_factor * batch.scores)
        centred, has_signal = centred_rewards(rewards, batch.num_generations)
        if args.drop_equal_groups:
            batch.exclude(~batch.local(has_signal)[:, None].expand_as(batch.inputs["completion_ids"]))
        self.log_metric("dler/cut_off", 1 - ended.float().mean().item())
        self.log_metric("dler/dropped_groups", 1 - has_signal.float().mean().item())
        bonus = args.correct_bonus * (batch.local(rewards) >= 1)
        whitened = batch.whiten(batch.local(centred).to(advantages)) + bonus.to(advantages)
        return whitened.masked_fill(batch.local(batch.unscorable), 0)
