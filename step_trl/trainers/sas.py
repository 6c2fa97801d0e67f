"""
SAS: step-level advantage selection (arXiv 2604.24003).

Departures from GRPO:
1. The thought of a completion is split into steps at blank lines.
2. The confidence of a step is the mean log-probability of its tokens under the policy (eq. 3).
3. The least confident steps of correct completions get advantage 0 (eq. 4).
4. The most confident steps of failed completions get advantage 0, as in the paper's later version, or 1 (eq. 5).
"""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ..advantages import select_step_advantages, selection_statistics, step_confidences
from ..steps import DelimiterSegmenter, Segmenter
from ..text import THINK_END
from .base import EfficientReasoningTrainer
from .batch import Batch, loss_mask
from .sas_config import SASConfig, StepSelection


class StepSelector:
    """
    Step-level advantage selection for a trainer, which calls [`mark`] in `credit` and [`select`] in `before_loss`.

    Confidence is measured with `old_per_token_logps` if TRL computes them (several iterations per batch, generation
    and optimisation not aligned, or vLLM). Otherwise, it is measured with the log-probabilities of the loss's own
    forward pass, which are those of the same policy, as it has not changed since the rollout. There is never a second
    forward pass.
    """

    def __init__(self, options: StepSelection, tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter | None = None):
        self.options = options
        self.segmenter = segmenter or DelimiterSegmenter(tokenizer, options.step_delimiter, end_text=THINK_END)

    def mark(self, batch: Batch) -> None:
        """Add `step_ids` `(B, T)` to the inputs of the loss: -1 for tokens that are not part of the selection."""
        inputs = batch.inputs
        step_ids = self.segmenter.step_ids(inputs["completion_ids"], loss_mask(inputs))
        left_alone = inputs["unscorable"].unsqueeze(1)
        if "sampling_per_token_logps" in inputs:
            # Injected tokens do not make a step unsure, and keep the advantage that teaches the model to stop.
            left_alone = left_alone | inputs["sampling_per_token_logps"].isnan()
        inputs["step_ids"] = step_ids.masked_fill(left_alone, -1)

    def select(self, trainer: EfficientReasoningTrainer, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """Turn the advantages of a micro-batch into those of its tokens `(B, T)`, and log what has changed."""
        advantages, step_ids, correct = inputs["advantages"], inputs["step_ids"], inputs["correct"]
        token_logps = inputs.get("old_per_token_logps", logps)
        # Eq. 4 withholds credit. A correct completion that a length or step reward puts below its group has no credit
        # to withhold, and its unsure steps, which made it long, would go unpunished.
        selected = select_step_advantages(
            advantages, token_logps, step_ids, correct, **self.options.options(), spare_negative=True
        )
        inputs["advantages"] = selected
        confidences = step_confidences(token_logps, step_ids)
        statistics = selection_statistics(advantages, selected, confidences, step_ids, correct)
        trainer.log_masked_means({f"sas/{name}": value for name, value in statistics.items()})
        trainer.monitor.observe("sas/confidence/histogram", confidences[~confidences.isnan()].tolist())
        trainer.monitor.observe("sas/steps/histogram", (step_ids.amax(dim=1) + 1).tolist())


class SASTrainer(EfficientReasoningTrainer):
    """
    Trainer for step-level advantage selection (SAS).

    SAS (arXiv 2604.24003) keeps training in a short context stable: it gives no credit to the uncertain steps of
    correct completions and does not punish the confident steps of failed ones, many of which were only cut off.
    Changes with respect to [`~trl.GRPOTrainer`]: advantages `(B,)` become `(B, T)` inside the loss, and the default
    reward requires a closed thought.

    Args:
        model, reward_funcs, args, train_dataset, **kwargs:
            As in [`EfficientReasoningTrainer`], with `args` a [`SASConfig`]. To compare with another trainer, give it
            the same reward: `require_end_of_thinking=True`.
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            The segmenter that defines the steps, instead of `step_delimiter`. Tokens whose step id is -1 are not part
            of the selection.

    Example:

    ```python
    from step_trl import SASConfig, SASTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = SASTrainer(
        load_model(),
        args=SASConfig("sas", max_completion_length=160, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sas"]
    _name = "SAS"
    _paper = {
        "title": "Stabilizing Efficient Reasoning with Step-Level Advantage Selection",
        "id": "2604.24003",
        "citation": textwrap.dedent("""\
            @article{wang2026stabilizing,
                title        = {{Stabilizing Efficient Reasoning with Step-Level Advantage Selection}},
                author       = {Wang, Han and Yu, Xiaodong and Wu, Jialian and Liu, Jiang and Sun, Ximeng and
                                Bansal, Mohit and Liu, Zicheng},
                year         = 2026,
                eprint       = {arXiv:2604.24003},
            }
            """),
    }
    config_class = SASConfig
    metric_prefixes = ("sas",)
    charts: ClassVar = {
        "Efficient reasoning": {
            "steps per completion": ["sas/steps/mean"],
            "confidence of selected steps": ["sas/confidence/changed", "sas/confidence/kept"],
        },
        "Is it healthy?": {
            "advantages changed by SAS": [
                *("sas/tokens_zeroed/correct", "sas/tokens_zeroed/failed", "sas/tokens_rewarded/failed"),
            ],
        },
    }
    args: SASConfig

    def __init__(self, model, *args, segmenter=None, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.step_selector = StepSelector(self.args, self._tokenizer, segmenter)
        self.monitor.segmenter = self.step_selector.segmenter

    def _headline(self):
        return super()._headline() | {"steps": "sas/steps/mean"}

    def credit(self, batch, advantages):
        self.step_selector.mark(batch)
        return advantages

    def before_loss(self, inputs, logps):
        self.step_selector.select(self, inputs, logps)
