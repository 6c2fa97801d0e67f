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
from typing import Any

import torch

from ..advantages import select_step_advantages, step_confidences
from ..steps import DelimiterSegmenter, Segmenter
from ..text import THINK_END
from .efficient import EfficientReasoningTrainer
from .sas_config import SASConfig, StepSelection


class StepSelectionMixin(EfficientReasoningTrainer):
    """
    Adds step-level advantage selection to a trainer that sets `self.step_selection`; `None` changes nothing.

    Which log-probabilities measure confidence: `old_per_token_logps` where TRL computes them (several iterations per
    batch, generation and optimisation not aligned, or vLLM); otherwise those of the loss's own forward pass, which are
    the same policy's, since it has not moved since the rollout. There is never a second forward pass.
    """

    step_selection: StepSelection | None = None

    def _enable_step_selection(self, step_selection: StepSelection | None, segmenter: Segmenter | None = None) -> None:
        self.step_selection = step_selection
        if segmenter is not None:
            self._step_segmenter = segmenter
        elif step_selection is not None:
            self._step_segmenter = DelimiterSegmenter(
                self._tokenizer, step_selection.step_delimiter, end_text=THINK_END
            )

    def _shown_steps(self):
        return super()._shown_steps() if self.step_selection is None else self._step_segmenter

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.step_selection is not None:
            mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, T)
            step_ids = self._step_segmenter.step_ids(output["completion_ids"], mask)
            output["correct"] = self._local(self._correct)
            # Eq. 4 withholds credit. A correct completion that a length or step reward puts below its group has none
            # to withhold, and would get away with the unsure steps that made it long.
            blamed = output["correct"] & (output["advantages"] < 0)
            left_alone = blamed | self._local(self._unscorable)
            output["step_ids"] = step_ids.masked_fill(left_alone[:, None], -1)
        return output

    def _refine_loss_inputs(self, inputs, logps):
        super()._refine_loss_inputs(inputs, logps)
        if self.step_selection is not None:
            token_logps = inputs.get("old_per_token_logps", logps)
            selected = select_step_advantages(
                inputs["advantages"],
                token_logps,
                inputs["step_ids"],
                inputs["correct"],
                **self.step_selection.options(),
            )
            self._log_selection(inputs, selected, token_logps)
            inputs["advantages"] = selected

    def _log_selection(self, inputs: dict[str, Any], selected: torch.Tensor, token_logps: torch.Tensor) -> None:
        """Shares of thought tokens whose advantage changed, mean confidences (log-probabilities) and steps."""
        step_ids, correct = inputs["step_ids"], inputs["correct"]
        thought = step_ids >= 0  # (B, T)
        changed = (selected != inputs["advantages"].unsqueeze(1)) & thought
        zeroed, rewarded = changed & (selected == 0), changed & (selected != 0)
        right, wrong = correct.unsqueeze(1) & thought, ~correct.unsqueeze(1) & thought
        confidences = step_confidences(token_logps, step_ids)  # (B, S)
        token_confidences = confidences.gather(1, step_ids.clamp(min=0))
        steps = step_ids.amax(dim=1) + 1
        for name, value, where in (
            ("tokens_zeroed/correct", zeroed, right),
            ("tokens_zeroed/failed", zeroed, wrong),
            ("tokens_rewarded/failed", rewarded, wrong),
            ("confidence/changed", token_confidences, changed),
            ("confidence/kept", token_confidences, thought & ~changed),
            ("steps/mean", steps, torch.ones_like(steps, dtype=torch.bool)),
        ):
            self._log_masked_mean(f"sas/{name}", value, where)
        self.observe("sas/confidence/histogram", confidences[~confidences.isnan()].tolist())
        self.observe("sas/steps/histogram", steps.tolist())

    def _log_masked_mean(self, name: str, value: torch.Tensor, where: torch.Tensor) -> None:
        totals = torch.stack([torch.where(where, value, 0).sum().float(), where.sum().float()])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        if count:
            self._metrics[self._mode][name].append(total / count)


class SASTrainer(StepSelectionMixin):
    """
    Trainer for step-level advantage selection (SAS).

    SAS (arXiv 2604.24003) keeps training in a short context stable: it gives no credit to the uncertain steps of
    correct completions and does not punish the confident steps of failed ones, many of which were only cut off.
    Changes with respect to [`~trl.GRPOTrainer`]: advantages `(B,)` become `(B, T)` inside the loss, and the default
    reward wants the thought closed.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Math accuracy after `</think>` by default; otherwise the first one tells which completions are correct
            (more than 0.5). A comparison with another trainer needs the same reward there:
            `require_end_of_thinking=True`.
        args ([`SASConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and, for the default reward, `solution`.
        eval_dataset, processing_class (*optional*):
            As in [`~trl.GRPOTrainer`].
        segmenter ([`~step_trl.steps.Segmenter`], *optional*):
            What a step is, in place of `step_delimiter`; tokens whose step id is -1 are not selected on.
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.

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
    args: SASConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        segmenter=None,
        **kwargs,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self._enable_step_selection(self.args, segmenter)

    def _headline(self):
        return super()._headline() | {"steps": "sas/steps/mean"}
