"""Options that all trainers share: those for long runs, the reward, and the tokens that are left out of the loss."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from trl import GRPOConfig

from ..rewards.length_rewards import check_length_reward
from ..runtime.run_config import RunConfig


def check_own_advantages(args: EfficientReasoningConfig, name: str) -> None:
    """Refuse options of advantages, for a method `name` that computes advantages of its own."""
    for field_name, default in (("length_reward", None), ("scale_rewards", "group")):
        if getattr(args, field_name) != default:
            raise ValueError(
                f"{field_name}: {getattr(args, field_name)!r} has no effect, since {name} has advantages of its own. "
                "Leave it out."
            )


@dataclass
class EfficientReasoningConfig(RunConfig):
    r"""
    Configuration of [`EfficientReasoningTrainer`]: these fields and those of [`RunConfig`] and [`~trl.GRPOConfig`].

    Args:
        length_reward (`str`, *optional*):
            A reward for short completions that is added to the correctness: `"kimi"`, `"soft_overlong"`,
            `"grpo_lambda"`, `"train_efficiently"`, `"l1_exact"` or `"l1_max"`, see [`~step_trl.rewards`]. It is
            computed over the global batch, and logged in its own column, without the correctness.
        length_reward_weight (`float`, *optional*, defaults to `1.0`):
            The weight of that column.
        length_reward_options (`dict`, *optional*):
            The options of that reward, such as `{"alpha": 0.2}`.
        probability_mask (`float`, *optional*):
            Leave tokens whose probability under the sampling policy is at least this out of the loss, such as `0.9` in
            SPO (arXiv 2505.23564). If TRL does not compute old log-probabilities, this takes one more forward pass per
            generation.
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            Whether the default reward, math accuracy, is 0 for a completion without `</think>`. It defaults to `True`
            in [`SASConfig`]. To compare another method with SAS, set it there, too, so that both train on the same
            reward.
    """

    # Maps the papers' symbols to fields. The papers call both the KL weight and the step penalty beta.
    _SYMBOLS: ClassVar[dict[str, str]] = {"G": "num_generations", "beta (KL)": "beta", "epsilon": "epsilon"}
    _OWN_LENGTH_REWARDS: ClassVar[tuple[str, ...]] = ()  # length rewards that no other trainer can use

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "length_reward_options"]

    length_reward: str | None = field(
        default=None, metadata={"help": "The name of a reward for short completions that is added to the correctness."}
    )
    length_reward_weight: float = field(default=1.0, metadata={"help": "The weight of the length reward."})
    length_reward_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The options of the length reward."}
    )
    probability_mask: float | None = field(
        default=None, metadata={"help": "Leave tokens of at least this probability, such as 0.9, out of the loss."}
    )
    require_end_of_thinking: bool = field(
        default=False, metadata={"help": "Whether the default reward is 0 for a completion without </think>."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.length_reward is not None:
            check_length_reward(self.length_reward, self.length_options(), self._OWN_LENGTH_REWARDS)
        elif self.length_reward_options is not None:
            raise ValueError("length_reward_options: length_reward is not set. Set it, or drop its options.")
        if self.probability_mask is not None and not 0 < self.probability_mask < 1:
            raise ValueError(
                f"probability_mask: {self.probability_mask} is not between 0 and 1. Set a probability such as 0.9, or "
                "None to train on all tokens."
            )
        if self.whole_groups(self):
            self._check_whole_groups()
        if self.rollouts_ahead:
            if not self.samples_ahead:
                raise ValueError(
                    f"rollouts_ahead: {self.rollouts_ahead} is not supported by this method, whose rollouts need more "
                    "than one request or the current policy. Set rollouts_ahead=0."
                )
            check_own_rollouts(self, ", or set rollouts_ahead=0")

    @staticmethod
    def whole_groups(options: Any) -> bool:
        """Return whether each process must sample whole groups, with these options, which may be a `Namespace`."""
        return False

    def _check_whole_groups(self) -> None:
        local = self.per_device_train_batch_size * cast("int", self.steps_per_generation)
        if local % cast("int", self.num_generations):
            raise ValueError(
                f"num_generations: {local} completions per process, which is per_device_train_batch_size * "
                f"steps_per_generation, are not whole groups of {self.num_generations}, and this method samples whole "
                "groups on each process. Set a multiple."
            )

    def length_options(self) -> dict[str, Any]:
        """Return `length_reward_options`, or an empty dictionary if they are not set."""
        # The parent's __post_init__ has read a JSON text from the command line.
        return self.length_reward_options if isinstance(self.length_reward_options, dict) else {}

    def symbols(self) -> dict[str, Any]:
        """Return the values of the method's symbols, under the papers' names."""
        return {symbol: getattr(self, name) for symbol, name in self._SYMBOLS.items()}

    def method_options(self) -> dict[str, Any]:
        """Return the options that only this method has, and those of its length reward."""
        shared = {one.name for one in fields(EfficientReasoningConfig)}
        names = [one.name for one in fields(self) if one.name not in shared]
        if self.length_reward is not None:
            names += ["length_reward", "length_reward_weight", "length_reward_options"]
        return {name: getattr(self, name) for name in names}

    @property
    def own_rollouts(self) -> bool:
        """Return whether the trainer samples the training completions itself, instead of TRL."""
        return False

    @property
    def samples_ahead(self) -> bool:
        """Return whether the method supports `rollouts_ahead=1`: each completion of a batch is one rollout."""
        return not self.own_rollouts

    def most_sampled_tokens(self, completions: int) -> dict[str, int]:
        """Return the most tokens that a generation batch of `completions` samples, by what they are for."""
        return {"completions": completions * cast("int", self.max_completion_length)}

    def check_start(self, model: str) -> None:
        """Raise a `ValueError` if the method cannot start from this model, given by its folder or name."""

    def describe(self) -> list[str]:
        """Describe what is trained, in the method's terms, for the plan of a training."""
        words = ["reward 1 for a correct answer" + " after a closed thought" * self.require_end_of_thinking]
        return words + self._describe_length_reward()

    def _describe_length_reward(self) -> list[str]:
        return [] if self.length_reward is None else [f"{self.length_reward_weight:g} {self.length_reward}"]


def check_own_rollouts(args: EfficientReasoningConfig, remedy: str = "") -> None:
    """Refuse options of TRL's generation that a method which samples by itself would ignore."""
    unsupported = [
        ("repetition_penalty", 1.0),
        ("generation_kwargs", None),
        ("cache_implementation", None),
        ("use_transformers_continuous_batching", False),
        ("vllm_structured_outputs_regex", None),
    ]
    if args.use_vllm and args.vllm_mode == "colocate":
        unsupported += [("vllm_tensor_parallel_size", 1), ("vllm_enable_sleep_mode", False)]
    for name, neutral in unsupported:
        if getattr(args, name) != neutral:
            raise ValueError(
                f"{name}: {getattr(args, name)!r} is not supported by rollouts that are not TRL's. Leave it at "
                f"{neutral!r}{remedy}."
            )
