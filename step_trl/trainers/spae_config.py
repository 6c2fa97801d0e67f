"""Options of SPAE, with the symbols of the paper (arXiv 2601.03823)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import cast

from ..checks import check_least
from .base_config import EfficientReasoningConfig, check_own_rollouts
from .sas_config import check_loss_type


@dataclass
class SPAEConfig(EfficientReasoningConfig):
    r"""
    Configuration of [`SPAETrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        step_boundary (`str`, *optional*, defaults to `r"[.!?]\n\n"`):
            The regular expression that ends a step of a thought: the end of a sentence before a blank line.
        answer_prompt (`str`, *optional*, defaults to `"**Final Answer**\n\\boxed{"`):
            The text that induces an answer after a step, in the open thought.
        probe_samples (`int`, *optional*, defaults to `5`):
            The number N of answers that are sampled after each step.
        max_probe_tokens (`int`, *optional*, defaults to `10`), probe_temperature (`float`, defaults to `0.6`):
            The maximum number of tokens of such an answer, and its temperature.
        probe_stop (`str`, *optional*, defaults to `"}"`):
            The text that ends such an answer. With `None`, only EOS and `max_probe_tokens` end it.
        max_probes (`int`, *optional*):
            The maximum number of steps of a thought that are probed, which bounds the cost. Steps between them are
            merged. By default, there is no limit.
        max_answer_tokens (`int`, *optional*, defaults to `32`):
            The maximum number of tokens of the right answer whose probability is measured, the first ones.
        potential_weights (`list[float]`, *optional*, defaults to `[1.5, 0.5, 1.0]`):
            The weights of accuracy times confidence, of accuracy, and of confidence, which is subtracted.
        saturation_threshold (`float`, *optional*, defaults to `0.9`):
            The potential above which a step is saturated: the policy is certain of the right answer.
        saturation_penalty (`float`, *optional*, defaults to `0.5`):
            The share of the advantage that steps lose after many saturated ones.
        bonus_weight (`float`, *optional*, defaults to `0.5`):
            The weight xi of the bonus for a step's change in potential.
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"N": "probe_samples", "xi": "bonus_weight"}

    step_boundary: str = field(
        default=r"[.!?]\n\n", metadata={"help": "The regular expression that ends a step of a thought."}
    )
    answer_prompt: str = field(
        default="**Final Answer**\n\\boxed{", metadata={"help": "The text that induces an answer after a step."}
    )
    probe_samples: int = field(default=5, metadata={"help": "The number of answers sampled after each step."})
    max_probe_tokens: int = field(default=10, metadata={"help": "The maximum number of tokens of such an answer."})
    probe_temperature: float = field(default=0.6, metadata={"help": "The temperature of such an answer."})
    probe_stop: str | None = field(default="}", metadata={"help": "The text that ends such an answer."})
    max_probes: int | None = field(
        default=None, metadata={"help": "The maximum number of steps of a thought that are probed."}
    )
    max_answer_tokens: int = field(
        default=32, metadata={"help": "The maximum number of tokens of the right answer that are measured."}
    )
    potential_weights: list[float] = field(
        default_factory=lambda: [1.5, 0.5, 1.0],
        metadata={"help": "The weights of accuracy times confidence, of accuracy, and of confidence."},
    )
    saturation_threshold: float = field(
        default=0.9, metadata={"help": "The potential above which a step is saturated."}
    )
    saturation_penalty: float = field(
        default=0.5, metadata={"help": "The share of the advantage that steps lose after many saturated ones."}
    )
    bonus_weight: float = field(
        default=0.5, metadata={"help": "The weight of the bonus for a step's change in potential."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.step_pattern()
        check_least(self, probe_samples=1, max_probe_tokens=1, max_answer_tokens=1, max_probes=1)
        if not self.answer_prompt:
            raise ValueError("answer_prompt: an empty text induces no answer. Set one that ends in '\\boxed{'.")
        if self.probe_stop == "":
            raise ValueError("probe_stop: an empty text ends every answer. Set '}', or None.")
        if not self.probe_temperature > 0:
            raise ValueError(
                f"probe_temperature: {self.probe_temperature} samples {self.probe_samples} equal answers. Set for "
                "example 0.6."
            )
        if len(self.potential_weights) != 3:
            raise ValueError(f"potential_weights: {self.potential_weights} are not three. Set [1.5, 0.5, 1.0].")
        if not 0 <= self.saturation_penalty <= 1:
            raise ValueError(
                f"saturation_penalty: {self.saturation_penalty} is not between 0 and 1. Set 0.5, or 0 for none."
            )
        if self.bonus_weight < 0:
            raise ValueError(f"bonus_weight: {self.bonus_weight} would reward a loss of potential. Set 0 for none.")
        check_loss_type(self)
        check_own_rollouts(self)

    def step_pattern(self) -> re.Pattern[bytes]:
        """Return the pattern of `step_boundary`, for a segmenter."""
        try:
            pattern = re.compile(self.step_boundary.encode())
        except re.error as error:
            raise ValueError(
                f"step_boundary: {self.step_boundary!r} is not a regular expression ({error}). Set for example "
                r"'[.!?]\n\n'."
            ) from None
        if pattern.match(b""):
            raise ValueError(
                f"step_boundary: {self.step_boundary!r} matches an empty text, which ends no step. Set for example "
                r"'[.!?]\n\n'."
            )
        return pattern

    @property
    def own_rollouts(self):
        return True

    def most_sampled_tokens(self, completions):
        longest = cast("int", self.max_completion_length)
        places = longest if self.max_probes is None else min(self.max_probes, longest)
        probes = completions * places * self.probe_samples * self.max_probe_tokens
        return super().most_sampled_tokens(completions) | {"probes": probes}

    def describe(self):
        most = "" if self.max_probes is None else f"at most {self.max_probes} "
        return [
            *super().describe(),
            f"{most}steps probed by {self.probe_samples} answers of at most {self.max_probe_tokens} tokens",
            f"bonus {self.bonus_weight:g} for potential, up to {self.saturation_penalty:.0%} less advantage above "
            f"{self.saturation_threshold:g}",
        ]
