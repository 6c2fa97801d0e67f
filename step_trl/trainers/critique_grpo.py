"""
Critique-GRPO: completions that were refined after a critique join their group (arXiv 2506.03106).

Departures from GRPO:
1. Each completion of a group without a correct one is criticised, and the policy answers again with the critique.
2. The first correct refinement, or any, takes the place of one completion of the group.
3. The refinement is trained as an answer to the question alone, with a loss that needs no ratio.
"""

from __future__ import annotations

import math
import textwrap
from array import array
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from accelerate.utils import gather_object

from ..losses import loss_as_advantages, reshaped_policy_loss
from ..rollout import Rollout
from ..rollout.refine import select_refinement
from ..runtime.ranks import rollout_seeds
from .base import EfficientReasoningTrainer
from .batch import Batch, loss_mask
from .critics import Critics
from .critique_grpo_config import CritiqueGRPOConfig


class CritiqueGRPOTrainer(EfficientReasoningTrainer):
    """
    Trainer for Critique-GRPO.

    Critique-GRPO (arXiv 2506.03106) helps where a problem is beyond the policy: it is told what was wrong, answers
    again, and learns from a refinement as if it had found it by itself. Changes with respect to
    [`~trl.GRPOTrainer`]: the first completion of a group may be a refinement, and the loss on it.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`CritiqueGRPOConfig`], except for `tools` and
    `rollout_func`. With `critique="indicative_gt"`, rows need a `solution`, whose answer is shown to the policy.

    Example:

    ```python
    from step_trl import CritiqueGRPOConfig, CritiqueGRPOTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = CritiqueGRPOTrainer(
        load_model(),
        args=CritiqueGRPOConfig("critique-grpo", max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "critique-grpo"]
    _name = "Critique-GRPO"
    _paper = {
        "title": "Critique-GRPO: Advancing LLM Reasoning with Natural Language and Numerical Feedback",
        "id": "2506.03106",
        "citation": textwrap.dedent("""\
            @article{zhang2025critiquegrpo,
                title        = {{Critique-GRPO: Advancing LLM Reasoning with Natural Language and Numerical Feedback}},
                author       = {Zhang, Xiaoying and Sun, Hao and Zhang, Yipeng and Feng, Kaituo and Lu, Chaochao and
                                Yang, Chao and Meng, Helen},
                year         = 2025,
                eprint       = {arXiv:2506.03106},
            }
            """),
    }
    config_class = CritiqueGRPOConfig
    metric_prefixes = ("critique",)
    charts: ClassVar = {
        "Is it healthy?": {
            "groups with a refinement": ["critique/refined_frac"],
            "correct refinements": ["critique/refined_correct"],
            "probability of refined tokens": ["critique/offpolicy_prob"],
        },
    }
    args: CritiqueGRPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_own_rollouts()
        columns = getattr(self.train_dataset, "column_names", None)  # `None` for a stream whose features are not known
        if self.args.critique != "indicative" and columns is not None and "solution" not in columns:
            raise ValueError(
                f"critique: {self.args.critique!r} needs a column `solution`, but train_dataset has "
                f"{', '.join(columns)}. Add it, or set critique='indicative'."
            )
        self._critics = Critics(self.args, self._policy_engine.max_length)

    def sample(self, batch):
        number, size = len(batch.prompt_ids), batch.num_generations
        seeds = self.seeds(number)
        rollouts = self.run_rollouts(batch.prompt_ids, seeds=seeds)
        right = self._are_right(batch, rollouts, range(number))
        correct = batch.gather(right).view(-1, size)
        to_refine = torch.ones_like(correct[:, 0]) if self.args.refine_when == "always" else ~correct.any(dim=1)
        self._refined = torch.zeros_like(right)
        self.log_metric("critique/refined_frac", to_refine.float().mean().item())
        if to_refine.any():  # on any process
            of_own = batch.local(to_refine.repeat_interleave(size)).tolist()
            places = [place for place in range(number) if of_own[place]]
            self._refine(batch, rollouts, places, right.tolist(), seeds)
        return rollouts

    def _refine(
        self,
        batch: Batch,
        rollouts: list[Rollout],
        places: list[int],
        right: list[bool],
        seeds: list[int] | None,
    ) -> None:
        """Put a refinement in the place of the first completion of each group. Every process must call this."""
        size, first = batch.num_generations, batch.accelerator.process_index * len(rollouts)
        prompts = self._critics.refinement_prompts(self, batch, rollouts, places, right, seeds)
        answers = self.run_rollouts(
            prompts, seeds=seeds and [rollout_seeds([seeds[place]], 2, 1)[0] for place in places]
        )
        scores = self._are_right(batch, answers, places).tolist()
        refinements = [self._as_answer(answer) for answer in answers]
        candidates: dict[int, list[tuple[float, list[int]]]] = {}
        for index, score, ids in gather_object(
            [(first + place, float(score), ids) for place, score, ids in zip(places, scores, refinements, strict=True)]
        ):
            candidates.setdefault(index // size, []).append((score, ids))
        kept_scores = []
        for group, found in candidates.items():
            seed = rollout_seeds([self.args.seed, self.state.global_step], group, 1)[0]
            score, ids = found[
                select_refinement(
                    [score for score, _ in found], seed if self.args.refinement_selection == "random" else None
                )
            ]
            kept_scores.append(score)
            slot = group * size - first
            if 0 <= slot < len(rollouts):
                # Not sampled from this prompt: without log-probabilities, TRL's corrections leave it alone.
                unknown = array("d", [math.nan] * len(ids))
                rollouts[slot] = Rollout(batch.prompt_ids[slot], ids, unknown, [False] * len(ids))
                self._refined[slot] = True
        self.log_metric("critique/refined_correct", sum(kept_scores) / len(kept_scores))

    def _are_right(self, batch: Batch, rollouts: list[Rollout], places: Sequence[int]) -> torch.Tensor:
        """Return whether each rollout answers the question at its place. Every process must call this."""
        return self.are_correct(
            self.score(
                [rollout.completion_ids for rollout in rollouts],
                [batch.rows[place] for place in places],
                [batch.prompt_ids[place] for place in places],
            )
        )

    def _as_answer(self, refinement: Rollout) -> list[int]:
        """Tokenize a refinement as an answer to the question alone, as the paper does. EOS follows if it has ended."""
        text = self._tokenizer.decode(refinement.completion_ids, skip_special_tokens=True)
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: self.max_completion_length]
        if refinement.ended:
            ids = [*ids[: cast("int", self.max_completion_length) - 1], refinement.completion_ids[-1]]
        return ids or refinement.completion_ids

    def credit(self, batch, advantages):
        if batch.training:
            batch.inputs["refined"] = self._refined
        return advantages

    def before_loss(self, inputs, logps):
        refined = inputs.get("refined")
        if refined is None:  # in an evaluation
            return
        advantages, weight, gamma = inputs["advantages"], self.args.refinement_weight, self.args.refinement_gamma
        old_logps, reshaped = inputs.get("old_per_token_logps", logps), dict(inputs)
        loss_as_advantages(reshaped, logps, lambda leaf: weight * reshaped_policy_loss(leaf, advantages, gamma))
        inputs["advantages"] = torch.where(refined[:, None], reshaped["advantages"], advantages[:, None])
        inputs["old_per_token_logps"] = torch.where(refined[:, None], logps, old_logps)
        on_refined = loss_mask(inputs).bool() & refined[:, None]
        self.log_masked_means({"critique/offpolicy_prob": (logps.exp(), on_refined)})
