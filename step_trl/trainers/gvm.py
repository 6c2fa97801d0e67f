"""
GVM: prompts are sampled as often as it lowers the variance of the gradient (arXiv 2505.02391).

Departures from GRPO:
1. E-step: the current policy's acceptance rates and gradient norms on the next prompts divide the budget among them.
2. A prompt's group has as many completions as its budget, and may have none.
3. M-step: RAFT++, whose advantage is the reward, or GRPO.
"""

from __future__ import annotations

import textwrap
from typing import ClassVar

from datasets import Dataset

from ..advantages import prompt_weights, ragged_advantages
from ..runtime.gradient_norms import check_whole_embeddings
from .base import EfficientReasoningTrainer
from .batch import loss_mask
from .gvm_budget import Budget
from .gvm_config import GVMConfig


class GVMTrainer(EfficientReasoningTrainer):
    """
    Trainer for GVM-RAFT++ and GVM-GRPO.

    GVM (arXiv 2505.02391) samples each prompt in proportion to the norm of its gradient, and more often if it is
    rarely solved, since that is where further completions lower the variance of the gradient most. Changes with
    respect to [`~trl.GRPOTrainer`]: which prompts are sampled, how often, and the advantages.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`GVMConfig`], except for `tools`,
    `rollout_func` and data sets that are streamed. The trainer chooses its prompts itself, in random permutations of
    `train_dataset`.
    """

    _tag_names = ["trl", "gvm"]
    _name = "GVM"
    _paper = {
        "title": "Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection Sampling and "
        "RL",
        "id": "2505.02391",
        "citation": textwrap.dedent("""\
            @article{yao2025gvm,
                title        = {{Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection
                                Sampling and RL}},
                author       = {Yao, Jiarui and Hao, Yifan and Zhang, Hanning and Dong, Hanze and Xiong, Wei and
                                Jiang, Nan and Zhang, Tong},
                year         = 2025,
                eprint       = {arXiv:2505.02391},
            }
            """),
    }
    config_class = GVMConfig
    metric_prefixes = ("budget",)
    charts: ClassVar = {
        "Is it healthy?": {
            "largest budget": ["budget/max"],
            "prompts without a budget": ["budget/zero_frac"],
            "acceptance rate": ["budget/accept_rate"],
            "gradient norm": ["budget/grad_norm"],
            "seconds per estimate": ["budget/estimate_seconds"],
        },
    }
    args: GVMConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_own_rollouts()
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"train_dataset: a {type(self.train_dataset).__name__} cannot be read in any order, which GVM does. "
                "Give a datasets.Dataset."
            )
        if self.args.ratio_by == "gradient_norm":
            check_whole_embeddings(self._dist.zero_stage, self._dist.fsdp_version)
        processes = self.accelerator.num_processes
        local = self.args.per_device_train_batch_size * (self.args.steps_per_generation or 1)
        self._budget = Budget(self.args, self.train_dataset, local * processes)

    def choose_rows(self, batch):
        rows, self._groups = self._budget.next_rows(self)
        return rows

    def sample(self, batch):
        return self.run_rollouts(batch.prompt_ids, seeds=self.seeds(len(batch.prompt_ids)))

    def credit(self, batch, advantages):
        if not batch.training:
            return advantages
        groups, scored, raft = batch.gather(self._groups), ~batch.unscorable, self.args.loss == "raft"
        own = batch.scores.clamp(min=0) if raft else ragged_advantages(batch.scores, groups, scored)
        if self.args.prompt_weighting == "prompt":
            lengths = batch.gather(loss_mask(batch.inputs).sum(dim=1))
            own = own * prompt_weights(groups, scored & (own > 0) if raft else scored, lengths)
        return batch.local(own).to(advantages)

    def method_state(self):
        return self._budget.state_dict()

    def load_method_state(self, state):
        self._budget.load_state_dict(state)
