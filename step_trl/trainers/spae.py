"""
SPAE: steps are credited with the change in how certain the policy is of the right answer (arXiv 2601.03823).

Departures from GRPO:
1. After each step of a thought, answers are induced. Their certainty is the step's confidence, and the probability of
   the right answer is its accuracy.
2. Both make the step's potential, which is 1 for a certain right answer and -1 for a certain wrong one.
3. Advantages shrink after steps whose potential is saturated, since thinking on was needless.
4. A step has a bonus for its change in potential.
5. Advantages are standardised over the tokens of the batch.
"""

from __future__ import annotations

import math
import textwrap
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ..advantages import (
    credit_steps,
    potential_bonuses,
    saturation_factors,
    step_potential,
    steps_at_cuts,
    thin_boundaries,
)
from ..rollout import AnswerProbes, ProbedThought, forced_answer
from ..runtime.signal_warnings import Symptom
from ..steps import Segmenter
from ..text import THINK_END
from .base import EfficientReasoningTrainer
from .batch import Batch, loss_mask
from .spae_config import SPAEConfig


class SPAETrainer(EfficientReasoningTrainer):
    """
    Trainer for step potential advantage estimation (SPAE).

    SPAE (arXiv 2601.03823) measures after each step of a thought how certain the policy is of an answer, and how
    probable the right one is. It rewards steps that bring the right answer nearer, and gives less credit to those that
    follow when it is certain. Changes with respect to [`~trl.GRPOTrainer`]: the advantages, one for each token.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`SPAEConfig`], except for `tools` and
    `rollout_func`. Rows must have the right answer as `solution`, whatever the reward functions are.

    Example:

    ```python
    from step_trl import SPAEConfig, SPAETrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = SPAETrainer(
        load_model(),
        args=SPAEConfig("spae", max_completion_length=160, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "spae"]
    _name = "SPAE"
    _paper = {
        "title": "Step Potential Advantage Estimation: Harnessing Intermediate Confidence and Correctness for "
        "Efficient Mathematical Reasoning",
        "id": "2601.03823",
        "citation": textwrap.dedent("""\
            @article{wu2026step,
                title        = {{Step Potential Advantage Estimation: Harnessing Intermediate Confidence and
                                Correctness for Efficient Mathematical Reasoning}},
                author       = {Wu, Fei and Zhang, Zhenrong and Chang, Qikai and Zhang, Jianshu and Liu, Quan and
                                Du, Jun},
                year         = 2026,
                eprint       = {arXiv:2601.03823},
            }
            """),
    }
    config_class = SPAEConfig
    metric_prefixes = ("spae",)
    charts: ClassVar = {
        "Efficient reasoning": {
            "probed steps per completion": ["spae/steps"],
            "potential of steps": ["spae/potential", "spae/accuracy", "spae/confidence"],
            "thought after saturation": ["spae/saturated"],
        },
        "Is it healthy?": {"sampled for probes, per token": ["spae/cost"]},
    }
    symptoms: ClassVar = (
        Symptom(
            "spae/steps",
            lambda value: value == 0,
            "No thought had the end of a step, so SPAE trained like GRPO. Look at a few completions, and set "
            "step_boundary to what ends their steps.",
        ),
    )
    args: SPAEConfig
    _needs_solution = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_own_rollouts()
        self._segmenter = self.monitor.segmenter = Segmenter(self._tokenizer, self.args.step_pattern(), THINK_END)

    def sample(self, batch):
        return self.run_rollouts(batch.prompt_ids, seeds=self.seeds(len(batch.prompt_ids)))

    def credit(self, batch, advantages):
        if not batch.training:
            return advantages
        args, mask = self.args, loss_mask(batch.inputs)
        in_thought = self._segmenter.step_ids(batch.inputs["completion_ids"], mask) >= 0
        lengths = in_thought.sum(dim=1).tolist()
        thoughts = self._thoughts(batch, lengths)
        potentials = self._potentials(batch, thoughts)
        factors = saturation_factors(potentials, args.saturation_threshold, args.saturation_penalty)
        factors, bonuses = (batch.local(of_steps) for of_steps in (factors, potential_bonuses(potentials)))
        steps = [
            steps_at_cuts(thought.cuts, length, mask.size(1))
            for thought, length in zip(thoughts, lengths, strict=True)
        ]
        step_ids = torch.stack(steps).to(mask.device)
        saturated = factors.gather(1, step_ids.clamp(min=0)) < 1
        self.log_masked_means({"spae/saturated": (saturated.float(), in_thought)})
        credited = credit_steps(advantages, step_ids, factors, bonuses, args.bonus_weight)
        return batch.whiten(credited).masked_fill(batch.local(batch.unscorable)[:, None], 0)

    def _thoughts(self, batch: Batch, lengths: list[int]) -> list[ProbedThought]:
        """Return this process's completions with the ends of their steps, `lengths` tokens of which are thought."""
        args, thoughts = self.args, []
        seeds: list[int] | list[None] = self.seeds(len(lengths)) or [None] * len(lengths)
        for prompt, ids, length, row, seed in zip(
            batch.prompt_ids, batch.completion_ids, lengths, batch.rows, seeds, strict=True
        ):
            induce, answer = forced_answer(
                self._tokenizer, args.answer_prompt, row["solution"], args.max_answer_tokens
            )
            needed = len(prompt) + len(induce) + max(args.max_probe_tokens, len(answer))
            room = self._policy_engine.max_length - needed
            cuts = [cut for cut in self._segmenter.boundaries(ids[:length]) if cut <= room]
            thoughts.append(ProbedThought(prompt, ids, thin_boundaries(cuts, args.max_probes), induce, answer, seed))
        return thoughts

    def _potentials(self, batch: Batch, thoughts: list[ProbedThought]) -> torch.Tensor:
        """Return the potentials `(B_global, S)` of the steps of all processes' thoughts, padded with NaN."""
        args, device = self.args, self.accelerator.device
        with self.policy_engine() as engine:
            probes = AnswerProbes(
                engine, args.probe_samples, args.max_probe_tokens, args.probe_temperature, args.probe_stop
            )
            found = probes.run(thoughts)
        rows = [torch.tensor(values, dtype=torch.float32).view(-1, 2) for values in found]
        measured = pad_sequence(rows, batch_first=True, padding_value=math.nan).to(device)  # (B, S, 2)
        accuracy, confidence = measured.unbind(dim=2)
        potentials = step_potential(accuracy, confidence, args.potential_weights)
        known = ~potentials.isnan()
        number = known.sum(dim=1).float()
        self.log_masked_means(
            {
                "spae/accuracy": (accuracy, known),
                "spae/confidence": (confidence, known),
                "spae/potential": (potentials, known),
                "spae/steps": (number, torch.ones_like(number, dtype=torch.bool)),
            }
        )
        tokens = torch.tensor([probes.sampled_tokens, sum(map(len, batch.completion_ids))], device=device)
        sampled, of_completions = self.accelerator.reduce(tokens, reduction="sum").tolist()
        self.log_metric("spae/cost", sampled / of_completions)
        return batch.gather(self.accelerator.pad_across_processes(potentials, dim=1, pad_index=math.nan))
