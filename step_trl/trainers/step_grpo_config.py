"""Options of Step-GRPO, with the symbols of the paper (arXiv 2604.16890)."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from ..checks import check_least
from ..rollout import ConfidenceTruncation
from .base_config import EfficientReasoningConfig, check_own_rollouts
from .sas_config import StepSelection, check_loss_type


_RELEASED = ConfidenceTruncation.released()
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {name: getattr(ConfidenceTruncation, name) for name in _RELEASED},
    "released": _RELEASED,
}


@dataclass
class StepGRPOConfig(EfficientReasoningConfig):
    r"""
    Configuration of [`StepGRPOTrainer`]: these fields and those of [`EfficientReasoningConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        variant (`str`, *optional*, defaults to `"paper"`):
            `"paper"` probes as the paper describes it, `"released"` as its released code does. It sets `triggers`,
            `answer_prompt`, `max_probes`, `keep_trigger`, `keep_probe_answer`, `require_probe_end`,
            `skip_probe_tokens` and `exit_margin`. Each of these that you set yourself keeps your value.
        triggers, answer_prompt, max_probe_tokens, max_probes (*optional*):
            Where an answer is induced, and how, as in [`ConfidenceTruncation`].
        keep_trigger, keep_probe_answer, require_probe_end, skip_probe_tokens, exit_margin, early_rejection:
            What counts as an answer, and what is kept of it, as in [`ConfidenceTruncation`].
        confidence_threshold (`float`, *optional*, defaults to `0.95`):
            Delta: a rollout stops when the confidence of its induced answer is strictly greater.
        speculative_probing (`bool`, *optional*, defaults to `True`):
            Whether a thought continues while its probe runs. This does not change the result, except for the draws of
            seeded rollouts on a vLLM server: its seeds belong to requests, and a thought that continues is one
            request.
        accuracy_weight (`float`, *optional*, defaults to `0.9`):
            Alpha: the weight of accuracy and efficiency. The format has the weight 1 - alpha. These weights also apply
            if some of `truncated_rollout`, `step_reward` and `format_reward` are off, as in the paper's ablations.
            With all three off, nothing is left of Step-GRPO, and accuracy has its own weight, as in GRPO.
        step_penalty (`float`, *optional*, defaults to `0.5`):
            Beta: the largest change that the number of steps makes to the reward of a correct completion.
        step_baseline (`str`, *optional*, defaults to `"correct"`):
            The completions of the group whose mean number of steps is mu: `"correct"` or `"all"`.
        truncated_rollout (`bool`, *optional*, defaults to `True`):
            Whether to truncate rollouts in training. Evaluation never truncates, so it shows what the model does by
            itself. A `rollout_func` of the trainer replaces the truncated rollout.
        step_reward (`bool`, *optional*, defaults to `True`), format_reward (`bool`, *optional*, defaults to `True`):
            Whether to use the efficiency and the format term of the reward.
        train_on_injected_tokens (`bool`, *optional*, defaults to `True`):
            Whether to keep the tokens that were not sampled from the policy (injected text, induced answers) in the
            loss. This teaches the model to stop by itself.
        advantage_selection (`dict`, *optional*):
            The fields of [`StepSelection`], such as `{"selection_ratio": 0.3}`, to combine Step-GRPO with step-level
            advantage selection.
    """

    _VALID_DICT_FIELDS = [*EfficientReasoningConfig._VALID_DICT_FIELDS, "advantage_selection"]
    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {
        "W": "triggers",
        "delta": "confidence_threshold",
        "alpha": "accuracy_weight",
        "beta (steps)": "step_penalty",
        "mu": "step_baseline",
    }

    variant: str = field(
        default="paper", metadata={"help": "Probe as the 'paper' does or as its 'released' code: sets eight options."}
    )
    # None until `__post_init__`, which takes the values that are not set from the variant.
    triggers: list[str] = field(
        default=None,  # type: ignore[arg-type]
        metadata={"help": "The words that open a semantic step. By default, those of the variant."},
    )
    confidence_threshold: float = field(
        default=0.95, metadata={"help": "Delta: stop when the confidence of the induced answer is greater."}
    )
    answer_prompt: str = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The text that induces an answer. By default, that of the variant."}
    )
    max_probe_tokens: int = field(default=20, metadata={"help": "The maximum number of tokens of an induced answer."})
    max_probes: int | None = field(
        default=None,
        metadata={"help": "The maximum number of probes per rollout. By default, no limit; 10 in the released code."},
    )
    keep_trigger: bool = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Keep the trigger in the path and before the probe. By default, as in the variant."},
    )
    keep_probe_answer: bool = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Keep a confident answer as the completion's. By default, as in the variant."}
    )
    require_probe_end: bool = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Give an unfinished answer confidence 0. By default, as in the variant."}
    )
    skip_probe_tokens: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Leave this many first tokens out of the confidence. By default, as in the variant."},
    )
    exit_margin: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Stop at a trigger this close to the end of the budget. By default, as in the variant."},
    )
    speculative_probing: bool = field(default=True, metadata={"help": "Continue a thought while its probe runs."})
    early_rejection: bool = field(default=True, metadata={"help": "Abort probes that cannot reach the threshold."})
    accuracy_weight: float = field(default=0.9, metadata={"help": "Alpha: weight of accuracy; 1 - alpha for format."})
    step_penalty: float = field(
        default=0.5, metadata={"help": "Beta: the largest change that steps make to a correct completion's reward."}
    )
    step_baseline: str = field(
        default="correct", metadata={"help": "The completions whose mean number of steps is mu: 'correct' or 'all'."}
    )
    truncated_rollout: bool = field(default=True, metadata={"help": "Truncate rollouts in training."})
    serial_group: InitVar[bool | None] = None  # no longer an option: fails with the name of the new trainer
    step_reward: bool = field(default=True, metadata={"help": "Use the efficiency term of the reward."})
    format_reward: bool = field(default=True, metadata={"help": "Use the format term of the reward."})
    train_on_injected_tokens: bool = field(default=True, metadata={"help": "Keep injected tokens in the loss."})
    advantage_selection: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The fields of StepSelection, to combine Step-GRPO with SAS."}
    )

    def __post_init__(self, serial_group):
        if serial_group is not None:
            raise ValueError("serial_group: S-GRPO has a trainer of its own. Use SGRPOTrainer (trainer: s_grpo).")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: {self.variant!r} is not known. Set 'paper' or 'released'.")
        for name, value in VARIANTS[self.variant].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self._check_ranges()
        if self.truncated_rollout:
            check_own_rollouts(self, ", or set truncated_rollout=False")
        selection = self.step_selection()
        if selection is not None:
            selection.validate()
            check_loss_type(self)

    def step_selection(self) -> StepSelection | None:
        """Return `advantage_selection` as an object."""
        # The parent's __post_init__ has read a JSON text from the command line.
        return StepSelection(**self.advantage_selection) if isinstance(self.advantage_selection, dict) else None

    @property
    def own_rollouts(self):
        return self.truncated_rollout

    @property
    def samples_ahead(self):
        return True

    def probe_options(self) -> dict[str, Any]:
        """Return the options of the [`ConfidenceTruncation`] that decides where rollouts stop."""
        names = (*VARIANTS["paper"], "max_probe_tokens", "early_rejection")
        return {name: getattr(self, name) for name in names} | {"threshold": self.confidence_threshold}

    def describe(self):
        words = []
        if self.truncated_rollout:
            words.append(
                f"rollouts end at {', '.join(self.triggers)} when an answer is more confident than "
                f"{self.confidence_threshold:g}"
            )
        words += self._describe_reward()
        if self.advantage_selection is not None:
            words.append(f"steps selected with {self.advantage_selection}")
        return words

    def _describe_reward(self) -> list[str]:
        if not (self.truncated_rollout or self.step_reward or self.format_reward):
            return EfficientReasoningConfig.describe(self)
        alpha = self.accuracy_weight
        words = [f"reward {alpha:g} accuracy"]
        words += [f"{alpha:g} step efficiency (beta {self.step_penalty:g})"] * self.step_reward
        words += [f"{1 - alpha:g} format"] * self.format_reward
        return words + self._describe_length_reward()

    def _check_ranges(self) -> None:
        if isinstance(self.triggers, str) or not self.triggers or not all(self.triggers):
            raise ValueError(f"triggers: {self.triggers!r} is not a list of words. Set for example ['Wait'].")
        self.triggers = tuple(self.triggers)  # type: ignore[assignment]
        for name, advice in (
            ("confidence_threshold", "a probability such as 0.95; 1.0 never stops a rollout"),
            ("accuracy_weight", "the weight alpha of accuracy such as 0.9"),
        ):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is outside (0, 1]. Set {advice}.")
        check_least(self, step_penalty=0, max_probe_tokens=1, skip_probe_tokens=0, exit_margin=0)
        if self.skip_probe_tokens >= self.max_probe_tokens:
            raise ValueError(
                f"skip_probe_tokens: {self.skip_probe_tokens} leaves no token of max_probe_tokens="
                f"{self.max_probe_tokens} to measure confidence on. Set a smaller number."
            )
        if self.max_probes is not None and self.max_probes < 1:
            raise ValueError(f"max_probes: {self.max_probes} allows no probe. Set truncated_rollout=False instead.")
        if self.step_baseline not in ("correct", "all"):
            raise ValueError(f"step_baseline: {self.step_baseline!r} is not known. Set 'correct' or 'all'.")
