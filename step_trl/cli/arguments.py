"""The fields of recipes, besides those of a method's configuration and of [`~trl.ModelConfig`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import SchedulerType
from trl import DPOConfig, SFTConfig

from ..checks import check_least
from ..evaluation.graders import GRADERS
from ..runtime.run_config import check_precision, drop_pin_memory


@dataclass
class TrainArguments:
    """The fields of a recipe besides those of the trainer's configuration and of [`~trl.ModelConfig`]."""

    trainer: str = field(
        metadata={"help": "The method, such as 'grpo', 'step_grpo' or 'sas', or 'distill', 'sft' or 'dpo'."}
    )
    dataset: str = field(metadata={"help": "A name on the Hub, a folder, a file, 'testbed' or 'vision-testbed'."})
    dataset_name: str | None = field(default=None, metadata={"help": "The configuration of the data set."})
    dataset_split: str = field(default="train", metadata={"help": "The split of the data set."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "The template of the user message, with {problem} in it."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    token_targets: list[int] | None = field(
        default=None, metadata={"help": "Two lengths: each prompt asks for one between them (L1)."}
    )
    token_targets_at_most: bool = field(
        default=False, metadata={"help": "Whether prompts ask for at most that length."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of step_trl.rewards or dotted paths of reward functions, by default math_accuracy_reward. "
            "The first one tells which completions are correct."
        },
    )
    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "The output_dir of a training with record_rollouts, for 'dpo' and easy_prompts. By default, the "
            "last earlier stage that has recorded rollouts."
        },
    )
    easy_prompts: float | None = field(
        default=None,
        metadata={"help": "Keep a prompt whose recorded rollouts were all correct with this probability (VerIPO)."},
    )

    def __post_init__(self):
        if self.easy_prompts is not None and not 0 <= self.easy_prompts <= 1:
            raise ValueError(f"easy_prompts: {self.easy_prompts} is not a probability. Set for example 0.2.")


@dataclass
class SamplingArguments(TrainArguments):
    """The fields of a recipe that samples before it fine-tunes. `engine` and `urls` are those of `step-trl eval`."""

    _COUNTS: ClassVar[tuple[str, ...]] = ("max_tokens",)  # fields that are at least 1

    limit: int | None = field(default=None, metadata={"help": "Use only this many rows, from the first."})
    thought_dropout: float = field(
        default=0.0, metadata={"help": "The probability with which an example loses its thought (TON)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    max_tokens: int = field(default=16_384, metadata={"help": "The maximum number of tokens per completion."})
    engine: str = field(default="transformers", metadata={"help": "The rollout engine: 'transformers' or 'vllm'."})
    urls: list[str] | None = field(
        default=None, metadata={"help": "The URLs of running vLLM servers. By default, one is started."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"engine: {self.engine!r} is not known. Set 'transformers' or 'vllm'.")
        check_least(self, **dict.fromkeys(self._COUNTS, 1))
        if not 0 <= self.thought_dropout <= 1:
            raise ValueError(f"thought_dropout: {self.thought_dropout} is not a probability. Set for example 0.5.")


@dataclass
class DistillArguments(SamplingArguments):
    """The fields of `trainer: distill` (DEER+SFT) besides those of [`~trl.ModelConfig`] and [`FineTuningConfig`]."""

    _COUNTS = ("n", "per_problem", "max_tokens")

    require_end_of_thinking: bool = field(
        default=True, metadata={"help": "Whether a completion without </think> is graded as wrong."}
    )
    n: int = field(default=4, metadata={"help": "The number of samples per problem."})
    per_problem: int = field(default=1, metadata={"help": "The maximum number of completions to keep per problem."})
    confidence: float = field(
        default=0.95,
        metadata={"help": "A thought ends when the confidence of an induced answer exceeds this; never with 1.0."},
    )
    grader: str = field(
        default="math",
        metadata={"help": "How completions are graded: 'math', 'choice', 'text', or 'block' for <answer> tags."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.grader not in GRADERS:
            raise ValueError(f"grader: {self.grader!r} is not known. Set one of {', '.join(map(repr, GRADERS))}.")


@dataclass
class SFTArguments(SamplingArguments):
    """
    The fields of `trainer: sft` besides those of [`~trl.ModelConfig`] and [`FineTuningConfig`]. Without
    `reverse_thinking`, nothing is sampled.
    """

    reverse_thinking: bool = field(
        default=False,
        metadata={"help": "Ask the model for the thoughts of problems whose answers are given (TON, stage 0)."},
    )


@dataclass
class DPOArguments(TrainArguments):
    """The fields of `trainer: dpo` (VerIPO) besides those of [`~trl.ModelConfig`] and [`PreferenceConfig`]."""

    dataset: str = field(
        default="", metadata={"help": "The rows of the rollouts, which have their images. Otherwise, not read."}
    )
    max_repetition: float = field(
        default=0.5, metadata={"help": "A thought with a larger share of repeated 4-grams is repetitive."}
    )
    max_length_ratio: float = field(
        default=2.0,
        metadata={"help": "A thought longer than this times the median of its group's correct ones is too long."},
    )
    reuse_chosen: bool = field(
        default=False, metadata={"help": "Whether both pairs of a group may prefer the same rollout."}
    )
    reflection: bool = field(
        default=False, metadata={"help": "Whether to build pairs of a rollout and its thought up to a wrong answer."}
    )
    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "The URL of an OpenAI-compatible server that judges consistency, with the key of JUDGE_API_KEY. "
            "By default, a rule decides."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The name of the judge on that server."})

    def __post_init__(self):
        super().__post_init__()
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url, judge_model: only one of them is set. Set both or neither.")


@dataclass
class FineTuningConfig(SFTConfig):
    """[`~trl.SFTConfig`] whose defaults are those of DEER+SFT in Step-GRPO's comparison."""

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "The number of warm-up updates, or their share of all updates if below 1."}
    )
    seed: int = field(default=0, metadata={"help": "The seed for sampling and training."})
    max_length: int | None = field(
        default=None, metadata={"help": "Cut longer rows to this many tokens. By default, no row is cut."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the rows before training."})
    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Whether to compute the loss on completions only, not on prompts."}
    )

    def __post_init__(self):
        check_precision(self)
        super().__post_init__()
        drop_pin_memory(self)


@dataclass
class PreferenceConfig(DPOConfig):
    """[`~trl.DPOConfig`] whose defaults are those of VerIPO (arXiv 2505.19000)."""

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate."})
    beta: float = field(default=0.1, metadata={"help": "The weight of the KL term to the policy of the rollouts."})
    seed: int = field(default=0, metadata={"help": "The seed of the training."})
    max_length: int | None = field(
        default=None, metadata={"help": "Cut longer rows to this many tokens. By default, no row is cut."}
    )

    def __post_init__(self):
        check_precision(self)
        super().__post_init__()
        drop_pin_memory(self)
