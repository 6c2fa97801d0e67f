"""Options of SPO (arXiv 2505.23564)."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Literal, cast

from ..advantages.tree import EdgeAdvantage
from ..checks import check_choices, check_least
from .base_config import EfficientReasoningConfig, check_own_rollouts
from .sas_config import check_loss_type


Structure = Literal["chain", "tree"]
PromptValue = Literal["none", "group_mean", "rollout"]


@dataclass
class SPOConfig(EfficientReasoningConfig):
    """
    Configuration of [`SPOTrainer`]: these fields and those of [`EfficientReasoningConfig`], [`RunConfig`] and
    [`~trl.GRPOConfig`].

    Args:
        structure (`str`, *optional*, defaults to `"chain"`):
            `"chain"` samples completions, and others from places in them to estimate values there. `"tree"` samples
            completions that share their beginnings, and trains on the segments of the tree: a group is one tree, and
            `num_generations` is the number of its segments that are trained on.
        value_samples (`int`, *optional*, defaults to `9`):
            The number N of completions that are sampled from each boundary to estimate its value. The paper takes 9
            for a 1B model on GSM8K, and 4 for long thoughts.
        cut_interval (`int`, *optional*, defaults to `5`):
            The number k: a segment ends before every k-th uncertain token.
        cut_threshold (`float`, *optional*, defaults to `0.9`):
            A token with a lower probability is uncertain.
        max_segments (`int`, *optional*):
            The maximum number of boundaries of a completion, which bounds its cost. They are thinned evenly. By
            default, there is no limit, as in the paper.
        prompt_value (`str`, *optional*, defaults to `"none"`):
            The base of the first segment: `"none"`, it has none and is not trained on, as in the released code;
            `"group_mean"`, the group's mean reward, which costs nothing; `"rollout"`, N further completions of the
            prompt, as in the paper.
        branching (`list[int]`, *optional*, defaults to `[6, 6, 6]`):
            Of a tree: the number of children on each level.
        segment_tokens (`int`, *optional*, defaults to `600`):
            Of a tree: the maximum length of a segment. The last ones continue to the end. The paper takes 30 on GSM8K,
            and 600 for long thoughts.
        edge_advantage (`str`, *optional*, defaults to `"rloo"`):
            Of a tree: `"rloo"`, the difference in value between a segment's end and its start, or `"grpo"`, which
            divides it by the standard deviation of the siblings.
        edges_per_question (`int`, *optional*, defaults to `32`):
            Of a tree: the maximum number of segments of one question in a generation. If `num_generations` is larger,
            the others are those that earlier generations have left.
        max_edge_age (`int`, *optional*, defaults to `8`):
            Of a tree: segments that are this many generations old are dropped.
        max_mean_ratio (`float`, *optional*, defaults to `10.0`):
            A micro-batch whose mean likelihood ratio is above this is not trained on.
        probability_mask (`float`, *optional*, defaults to `0.9`):
            As in [`EfficientReasoningConfig`]: only tokens that are less probable than this are trained on. `None` for
            all tokens.
    """

    _SYMBOLS = EfficientReasoningConfig._SYMBOLS | {"N": "value_samples", "k": "cut_interval", "rho": "cut_threshold"}

    structure: Structure = field(default="chain", metadata={"help": "How values are estimated: 'chain' or 'tree'."})
    value_samples: int = field(default=9, metadata={"help": "The number of completions that estimate a value."})
    cut_interval: int = field(default=5, metadata={"help": "A segment ends before every k-th uncertain token."})
    cut_threshold: float = field(default=0.9, metadata={"help": "A token with a lower probability is uncertain."})
    max_segments: int | None = field(default=None, metadata={"help": "The maximum number of boundaries."})
    prompt_value: PromptValue = field(
        default="none", metadata={"help": "The value of a prompt: 'none', 'group_mean' or 'rollout'."}
    )
    branching: list[int] = field(
        default_factory=lambda: [6, 6, 6], metadata={"help": "Of a tree: the number of children on each level."}
    )
    segment_tokens: int = field(default=600, metadata={"help": "Of a tree: the maximum length of a segment."})
    edge_advantage: EdgeAdvantage = field(
        default="rloo", metadata={"help": "Of a tree: 'rloo', or 'grpo', which divides by a standard deviation."}
    )
    edges_per_question: int = field(
        default=32, metadata={"help": "Of a tree: the maximum number of segments of one question in a generation."}
    )
    max_edge_age: int = field(
        default=8, metadata={"help": "Of a tree: segments that are this many generations old are dropped."}
    )
    max_mean_ratio: float = field(
        default=10.0, metadata={"help": "A micro-batch whose mean ratio is above this is not trained on."}
    )
    probability_mask: float | None = field(
        default=0.9, metadata={"help": "Leave tokens of at least this probability out of the loss."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_least(self, value_samples=1, cut_interval=1, segment_tokens=1, edges_per_question=1, max_edge_age=1)
        if not self.branching or min(self.branching) < 1 or max(self.branching) < 2:
            raise ValueError(f"branching: {self.branching} is not a tree. Set for example [6, 6, 6].")
        if self.max_segments is not None and self.max_segments < 1:
            raise ValueError(f"max_segments: {self.max_segments} allows no segment. Set at least 1, or None.")
        if not 0 < self.cut_threshold <= 1:
            raise ValueError(f"cut_threshold: {self.cut_threshold} is not a probability. Set for example 0.9.")
        if not self.max_mean_ratio > 1:
            raise ValueError(f"max_mean_ratio: {self.max_mean_ratio} is not above 1, the ratio of an unmoved policy.")
        check_choices(self, structure=Structure, prompt_value=PromptValue, edge_advantage=EdgeAdvantage)
        if self.length_reward is not None:
            raise ValueError(
                f"length_reward: {self.length_reward!r} compares a completion with its group, but SPO values "
                "completions one by one. Leave it out, or give a reward function that looks at the length."
            )
        check_loss_type(self)
        check_own_rollouts(self)

    @staticmethod
    def whole_groups(options):
        return options.structure == "tree"

    @property
    def own_rollouts(self):
        return True

    def most_sampled_tokens(self, completions):
        most, groups = super().most_sampled_tokens(completions), completions // cast("int", self.num_generations)
        longest = cast("int", self.max_completion_length)
        if self.structure == "tree":
            *inner, leaves = itertools.accumulate(self.branching, operator.mul)
            rest = max(0, longest - self.segment_tokens * len(inner))
            return {"trees": groups * (sum(inner) * min(self.segment_tokens, longest) + leaves * rest)}
        places = range(self.cut_interval, longest, self.cut_interval)[: self.max_segments]  # the earliest possible
        of_completion = sum(longest - place for place in places)
        of_prompts = groups * longest if self.prompt_value == "rollout" else 0
        return most | {"values": (completions * of_completion + of_prompts) * self.value_samples}

    def describe(self):
        if self.structure == "tree":
            branching = "-".join(map(str, self.branching))
            words = [
                f"trees of {branching} segments of {self.segment_tokens} tokens",
                f"{self.edge_advantage} advantages",
            ]
        else:
            words = [
                f"segments of {self.cut_interval} tokens less probable than {self.cut_threshold:g}",
                f"values from {self.value_samples} completions each",
            ]
        if self.probability_mask is not None:
            words.append(f"only tokens less probable than {self.probability_mask:g} are trained on")
        return [*super().describe(), *words]
