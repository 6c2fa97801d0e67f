"""Options of Critique-GRPO (arXiv 2506.03106)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import check_choices
from ..losses import check_loss_options
from ..rollout.refine import Critique
from .base_config import EfficientReasoningConfig, check_own_rollouts


RefineWhen = Literal["all_wrong", "always"]
Selection = Literal["random", "first"]


@dataclass
class CritiqueGRPOConfig(EfficientReasoningConfig):
    """
    Configuration of [`CritiqueGRPOTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    The defaults of `loss_type` and `scale_rewards` are the paper's: advantages are not divided by a standard
    deviation, and the loss is a sum over tokens, divided by a constant.

    Args:
        critique (`str`, *optional*, defaults to `"indicative_gt"`):
            What the policy is told about its solution: `"indicative"`, whether it is correct; `"indicative_gt"`, that
            and the reference answer, as in the released script; `"self"`, a critique by the policy itself; `"cot"`,
            one by the model at `critic_url`. A critique whose verdict is not that of the reward is replaced by
            `"indicative_gt"`.
        refine_when (`str`, *optional*, defaults to `"all_wrong"`):
            Which groups are refined: `"all_wrong"`, those without a correct completion, as in the paper, or
            `"always"`, as in the released code.
        refinement_selection (`str`, *optional*, defaults to `"random"`):
            Which refinement is kept if none is correct: a `"random"` one, as in the paper, or the `"first"` with the
            highest score, as in the released code.
        refinement_gamma (`float`, *optional*, defaults to `0.1`):
            The shape of the loss on refinements, see [`~step_trl.losses.reshaped_policy_loss`].
        refinement_weight (`float`, *optional*, defaults to `1.0`):
            The weight of that loss. With 1, all tokens count alike, as in the released code. The paper's objective
            divides by the numbers of initial completions and of refinements: set `num_generations - 1` for it.
        max_refinement_prompt_length (`int`, *optional*):
            The maximum length of a prompt for a critique or a refinement, in tokens. The earlier solution loses its
            beginning where it does not fit. By default, what a completion or critique leaves of the context of the
            model, or of vLLM.
        max_critique_length (`int`, *optional*, defaults to `1024`):
            The maximum length of a critique of `critique="self"`, in tokens.
        critic_url (`str`, *optional*), critic_model (`str`, *optional*):
            The OpenAI-compatible endpoint and its model, for `critique="cot"`. The key, if it needs one, is read from
            the environment variable `CRITIC_API_KEY`.
        critic_options (`dict`, *optional*):
            Further fields of its requests, by default the paper's `temperature` 0.7, `top_p` 0.75 and `max_tokens`
            4,096.
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"gamma": "refinement_gamma"}
    _VALID_DICT_FIELDS = [*EfficientReasoningConfig._VALID_DICT_FIELDS, "critic_options"]

    critique: Critique = field(
        default="indicative_gt", metadata={"help": "The critique: 'indicative', 'indicative_gt', 'self' or 'cot'."}
    )
    refine_when: RefineWhen = field(
        default="all_wrong", metadata={"help": "Which groups are refined: 'all_wrong' or 'always'."}
    )
    refinement_selection: Selection = field(
        default="random", metadata={"help": "The refinement that is kept if none is correct: 'random' or 'first'."}
    )
    refinement_gamma: float = field(default=0.1, metadata={"help": "The shape of the loss on refinements."})
    refinement_weight: float = field(default=1.0, metadata={"help": "The weight of the loss on refinements."})
    max_refinement_prompt_length: int | None = field(
        default=None, metadata={"help": "The maximum length of a prompt for a critique or a refinement, in tokens."}
    )
    max_critique_length: int = field(default=1024, metadata={"help": "The maximum length of a self-critique."})
    critic_url: str | None = field(default=None, metadata={"help": "The endpoint of critique='cot'."})
    critic_model: str | None = field(default=None, metadata={"help": "The model at critic_url."})
    critic_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of the requests to critic_url."}
    )
    loss_type: str = field(default="dr_grpo", metadata={"help": "The loss's normaliser, see GRPOConfig."})
    scale_rewards: str = field(default="none", metadata={"help": "How advantages are scaled, see GRPOConfig."})

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, critique=Critique, refine_when=RefineWhen, refinement_selection=Selection)
        for name in ("refinement_gamma", "refinement_weight", "max_critique_length", "max_refinement_prompt_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} is not positive. Leave it out for the default.")
        if (self.critique == "cot") != (self.critic_url is not None) or (self.critic_url is None) != (
            self.critic_model is None
        ):
            raise ValueError(
                f"critic_url: critique={self.critique!r} with critic_url={self.critic_url!r} and "
                f"critic_model={self.critic_model!r}. Set both with critique='cot', and neither otherwise."
            )
        check_loss_options(self)
        check_own_rollouts(self)

    @property
    def own_rollouts(self):
        return True

    def most_sampled_tokens(self, completions):
        most = super().most_sampled_tokens(completions)
        most["refinements"] = most["completions"]
        return most | ({"critiques": completions * self.max_critique_length} if self.critique == "self" else {})

    def describe(self):
        groups = "groups without a correct completion" if self.refine_when == "all_wrong" else "all groups"
        return [*super().describe(), f"{groups} are refined after a critique ({self.critique})"]
