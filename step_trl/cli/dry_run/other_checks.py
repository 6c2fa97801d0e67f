"""The checks of recipes that do not train by reinforcement learning: `distill`, `sft` and `dpo`."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import clear_environment
from trl import ModelConfig

from ...data import prompt_length, tokenize_examples, validate_rows
from ..arguments import SFTArguments, TrainArguments
from ..fine_tuning import check_no_model
from ..recipe import DISTILL, DPO, OTHER_TRAINERS, SFT
from ..sources import load_examples, load_rows
from ..train import is_done
from .checks import (
    Checks,
    check_model,
    compare,
    describe_rollouts,
    output_folder,
    plain,
    read_fields,
    sampled,
    training_options,
    wrong_of_any,
)
from .memory import Workload
from .stage_plan import StagePlan


def describe_distillation(plan: StagePlan) -> str:
    """Describe what is sampled and which samples are kept."""
    values = plan.values
    return (
        f"trainer {values.trainer!r}, {values.n} completions of each problem of at most {values.max_tokens:,} tokens; "
        f"thoughts end when an answer is more confident than {values.confidence:g}; the shortest correct completions "
        f"of each problem, at most {values.per_problem}, are used for training{_dropout(plan)}"
    )


def describe_examples(plan: StagePlan) -> str:
    """Describe what the model is fine-tuned on."""
    values = plan.values
    source = "the examples of the data set"
    if values.reverse_thinking:
        source = f"thoughts of at most {values.max_tokens:,} tokens that the model writes for known answers"
    return f"trainer {values.trainer!r}, on {source}{_dropout(plan)}"


def describe_preferences(plan: StagePlan) -> str:
    """Describe which rollouts are paired."""
    values = plan.values
    judge = "a rule" if values.judge_url is None else f"{values.judge_model} at {values.judge_url}"
    return (
        f"trainer {values.trainer!r}, on pairs of rollouts; {judge} tells which thoughts lead to their answers; "
        f"thoughts are repetitive above {values.max_repetition:g}, and too long above {values.max_length_ratio:g} "
        f"times the median of correct ones; beta {plan.config.beta:g}"
    )


def _dropout(plan: StagePlan) -> str:
    dropout = plan.values.thought_dropout
    return f", without their thought with probability {dropout:g}" if dropout else ""


def check_config(plan: StagePlan) -> str:
    """Check the fields by the rules of both classes that hold them."""
    arguments, kind = OTHER_TRAINERS[plan.values.trainer]
    plan.dataclass_of(arguments)
    with clear_environment():
        config = plan.config = plan.dataclass_of(kind, use_cpu=True, tf32=None)
    if wrong := wrong_of_any(plan):
        raise ValueError("\n".join(wrong))
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    processes = plan.layout.processes
    what = "pairs" if plan.values.trainer == DPO else "completions"
    return (
        f"valid: {config.num_train_epochs:g} epochs, updates of {rows * processes} {what} by {processes} "
        f"process{'es' * (processes > 1)}, learning rate {config.learning_rate:g} {plain(config.lr_scheduler_type)}"
    )


def check_problems(plan: StagePlan) -> str:
    values = plan.values
    if values.dataset is None:
        return "none"
    rows = load_rows(plan.dataclass_of(TrainArguments))
    validate_rows(rows, needs_solution=True, name="dataset")
    plan.rows = rows
    plan.longest_row = values.max_tokens + max(
        prompt_length(prompt, plan.tokenizer) for prompt in sampled(rows["prompt"])
    )
    asked = len(rows) if values.limit is None else min(values.limit, len(rows))
    return f"{values.dataset} ({values.dataset_split}): {asked:,} of {len(rows):,} rows are sampled"


def check_examples(plan: StagePlan) -> str:
    values = plan.values
    if values.reverse_thinking or values.dataset is None:
        return check_problems(plan)
    rows = load_examples(plan.dataclass_of(SFTArguments))
    lengths = [
        len(row) for row in tokenize_examples(rows.select(sampled(range(len(rows)))), plan.tokenizer)["input_ids"]
    ]
    plan.longest_row = max(lengths) if values.max_length is None else min(max(lengths), values.max_length)
    return f"{values.dataset} ({values.dataset_split}): {len(rows):,} examples of at most {max(lengths):,} tokens"


def check_rollouts(plan: StagePlan) -> str:
    found = describe_rollouts(plan)
    recording = [stage for stage in plan.earlier if stage.longest_prompt is not None]
    if recording:
        longest = recording[-1].longest_prompt + recording[-1].values.max_completion_length
        plan.longest_row = longest if plan.values.max_length is None else min(longest, plan.values.max_length)
    return f"pairs of {found}"


def check_memory(plan: StagePlan) -> str:
    config, pairs = plan.config, plan.values.trainer == DPO
    work = Workload(
        plan.dataclass_of(ModelConfig),
        plan.layout,
        max_length=plan.longest_row,
        micro_batch=config.per_device_train_batch_size * (2 if pairs else 1),
        has_reference=pairs,
        padded=config.per_device_train_batch_size > 1 or pairs,
        **training_options(plan),
    )
    return compare(plan, work)


def check_output(plan: StagePlan) -> str:
    folder = output_folder(plan)
    if plan.stages > 1 and is_done(folder):
        return f"{folder}, which is done and is left as it is"
    check_no_model(folder)
    return f"{folder}" + ", whose samples are reused" * (folder / "samples").exists()


def _checks(
    describe: Callable[[StagePlan], str], check_data: Callable[[StagePlan], str], needs: tuple[str, ...]
) -> Checks:
    return (
        ("fields", read_fields, ()),
        ("config", check_config, ("values",)),
        ("method", describe, ("config",)),
        ("model", check_model, ("values",)),
        ("data", check_data, needs),
        ("memory", check_memory, ("config", "model_config", "longest_row")),
        ("output", check_output, ("values",)),
    )


OTHER_CHECKS: dict[str, Checks] = {
    DISTILL: _checks(describe_distillation, check_problems, ("values", "tokenizer")),
    SFT: _checks(describe_examples, check_examples, ("values", "tokenizer")),
    DPO: _checks(describe_preferences, check_rollouts, ("values",)),
}
