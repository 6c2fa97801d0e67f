"""Options of GVM (arXiv 2505.02391)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ..checks import check_choices, check_least
from ..rollout.allocation import Rounding
from .base_config import EfficientReasoningConfig, check_own_advantages, check_own_rollouts


Loss = Literal["raft", "grpo"]
RatioBy = Literal["gradient_norm", "accept_rate"]
PromptWeighting = Literal["token", "prompt"]


@dataclass
class GVMConfig(EfficientReasoningConfig):
    """
    Configuration of [`GVMTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    `num_generations` is the mean number of completions per prompt.

    Args:
        loss (`str`, *optional*, defaults to `"raft"`):
            `"raft"`, RAFT++: a completion's advantage is its reward, so that only accepted ones are trained on.
            `"grpo"`: the reward is compared with those of the prompt's other completions.
        estimate_samples (`int`, *optional*, defaults to `8`):
            The number N' of completions of each prompt that its budget is estimated from.
        generations_per_estimate (`int`, *optional*, defaults to `9`):
            How many generation batches one estimate is for. It distributes their completions over as many prompts as
            GRPO would sample in them.
        ratio_by (`str`, *optional*, defaults to `"gradient_norm"`):
            `"gradient_norm"`, or `"accept_rate"`, which takes all norms as 1 and needs no backward pass.
        budget_alpha (`float`, *optional*, defaults to `1e-3`), budget_beta (`float`, *optional*, defaults to `2.0`):
            How much prompts that are almost never solved are held back, see [`~step_trl.rollout.gvm_weights`].
        filter_threshold (`float`, *optional*, defaults to `0.0`):
            Leave out prompts with a higher acceptance rate. 0 for no limit.
        filter_insufficient (`float`, *optional*, defaults to `0.0`):
            Leave out prompts with a smaller expected number of accepted completions. 0 for no limit.
        rounding (`str`, *optional*, defaults to `"residual"`):
            How budgets are rounded, see [`~step_trl.rollout.preserve_sum`].
        prompt_weighting (`str`, *optional*, defaults to `"token"`):
            `"token"`, every token of a generation batch counts the same, as in the released code; `"prompt"`, every
            prompt does, as in the paper's equation.
        epsilon_high (`float`, *optional*):
            The upper clip range. By default 0.35 with `loss="raft"`, and `epsilon` with `"grpo"`.
        delta (`float`, *optional*, defaults to `3.0`):
            The bound of the ratio where the advantage is negative (dual clip), see [`~trl.GRPOConfig`].
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {
        "N'": "estimate_samples",
        "alpha": "budget_alpha",
        "beta": "budget_beta",
    }

    loss: Loss = field(default="raft", metadata={"help": "The loss of the M-step: 'raft' or 'grpo'."})
    estimate_samples: int = field(
        default=8, metadata={"help": "The number of completions of a prompt that its budget is estimated from."}
    )
    generations_per_estimate: int = field(
        default=9, metadata={"help": "The number of generation batches that one estimate is for."}
    )
    ratio_by: RatioBy = field(
        default="gradient_norm", metadata={"help": "What budgets depend on: 'gradient_norm' or 'accept_rate' alone."}
    )
    budget_alpha: float = field(default=1e-3, metadata={"help": "How much hard prompts are held back."})
    budget_beta: float = field(default=2.0, metadata={"help": "The exponent with which hard prompts are held back."})
    filter_threshold: float = field(
        default=0.0, metadata={"help": "Leave out prompts with a higher acceptance rate. 0 for no limit."}
    )
    filter_insufficient: float = field(
        default=0.0, metadata={"help": "Leave out prompts with fewer expected correct completions. 0 for no limit."}
    )
    rounding: Rounding = field(
        default="residual", metadata={"help": "How budgets are rounded: 'residual' or 'accept_rate'."}
    )
    prompt_weighting: PromptWeighting = field(
        default="token", metadata={"help": "What counts the same in the loss: each 'token', or each 'prompt'."}
    )
    delta: float | None = field(
        default=3.0, metadata={"help": "The bound of the ratio where the advantage is negative, see GRPOConfig."}
    )

    def __post_init__(self):
        if self.epsilon_high is None and self.loss == "raft":
            self.epsilon_high = 0.35
        super().__post_init__()
        check_least(self, estimate_samples=1, generations_per_estimate=1)
        for name in ("budget_alpha", "filter_threshold", "filter_insufficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative. Set 0 or more.")
        check_choices(self, loss=Loss, ratio_by=RatioBy, rounding=Rounding, prompt_weighting=PromptWeighting)
        self._check_fit()
        check_own_rollouts(self)

    def _check_fit(self) -> None:
        """Refuse options that groups of different sizes have no use for."""
        if self.length_reward is not None:
            raise ValueError(
                f"length_reward: {self.length_reward!r} compares a completion with a group of num_generations, but "
                "GVM's groups differ in size. Leave it out, or give a reward function that looks at the length."
            )
        check_own_advantages(self, "GVM")
        if self.prompt_weighting == "prompt" and self.loss_type != "dapo":
            raise ValueError(
                f"loss_type: {self.loss_type!r} is not a mean over tokens, which prompt_weighting='prompt' weights. "
                "Set 'dapo'."
            )
        checkpointing = cast("dict[str, Any]", self.gradient_checkpointing_kwargs or {})  # TRL has read a JSON text
        if self.ratio_by == "gradient_norm" and checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant=True does not allow the gradient of one tensor. Leave "
                "it out, or set ratio_by='accept_rate'."
            )

    @property
    def own_rollouts(self):
        return True

    def most_sampled_tokens(self, completions):
        prompts = completions // self.num_generations
        estimates = prompts * self.estimate_samples * self.max_completion_length
        return super().most_sampled_tokens(completions) | {"estimates": estimates}

    def describe(self):
        return [
            *super().describe(),
            f"{self.num_generations} completions per prompt on average, by the {self.ratio_by.replace('_', ' ')} of "
            f"{self.estimate_samples} others, for {self.generations_per_estimate} generations",
            f"{self.loss} loss",
        ]
