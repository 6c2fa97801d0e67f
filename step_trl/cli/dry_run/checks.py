"""
The checks of `step-trl train --dry-run`. Each returns its line of the plan, or raises an error if something is wrong.

They are functions of a [`StagePlan`], on which they store what later checks need.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import clear_environment
from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl import ModelConfig
from trl.import_utils import is_vllm_available

from ...data import prompt_length, validate_prompt_lengths, validate_rows
from ...preferences import read_rollouts
from ...rewards.length_rewards import TARGETS_IN_ROWS
from ...rollout.engines import VLLMServerEngine
from ...rollout.event_loop import run_to_end
from ...runtime.run_config import server_urls
from ...text import tokenizer_of
from ...token_targets import validate_targets
from ...trainers import METHODS
from ..arguments import TrainArguments
from ..recipe import parse_values, trainer_name
from ..sources import earlier_rollouts, load_reward_funcs, load_rows, model_source
from ..train import check_output_dir, is_done, stage_folder
from .batches import Batches
from .memory import RESERVE, Workload, estimate_memory, remedies, size_text
from .stage_plan import StagePlan


SAMPLED_PROMPTS = 1_000
SERVER_SECONDS = 5.0  # for which to retry a server that does not answer


def read_fields(plan: StagePlan) -> str:
    """Read the fields, and report each one that is wrong by itself. The others are read without it."""
    trainer = trainer_name(plan.recipe, plan.arguments)
    plan.values, wrong = parse_values(trainer, plan.recipe, plan.arguments)
    if wrong:
        raise ValueError("\n".join(wrong))
    return "all known"


def describe_method(plan: StagePlan) -> str:
    """Describe what is trained, in the method's terms."""
    config = plan.config
    words = [f"trainer {plan.values.trainer!r}", *config.describe(), f"KL {config.beta:g}"]
    return ", ".join([*words, f"learning rate {config.learning_rate:g} {plain(config.lr_scheduler_type)}"])


def plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def check_config(plan: StagePlan) -> str:
    """Check the configuration by its own rules. Batch sizes, which have their own check, are set to ones that fit."""
    values = plan.values
    neutral = {
        "use_cpu": True,
        "tf32": None,
        "generation_batch_size": None,
        "steps_per_generation": max(values.num_generations, 1),
        "num_generations": max(values.num_generations, 2),
        "eval_strategy": "no",
    }
    with clear_environment():  # no process group is initialized, so that one process can plan for many
        config = plan.config = plan.dataclass_of(METHODS[values.trainer][1], **neutral)
    wrong = wrong_of_any(plan)
    by_disk = values.vllm_mode == "server" and values.weight_sync == "disk"
    if values.use_vllm and not by_disk and not is_vllm_available():
        wrong.append("use_vllm: vLLM is not installed here. In your clone of step_trl, run: pip install -e '.[vllm]'")
    if plan.number == 1:  # a later stage's model is still to be trained
        try:
            config.check_start(model_source(values.model_name_or_path))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    return "valid"


def wrong_of_any(plan: StagePlan) -> list[str]:
    """Check options that no trainer of a recipe supports."""
    wrong = []
    if (strategy := plain(plan.values.eval_strategy)) != "no":
        wrong.append(f"eval_strategy: {strategy!r} needs rows to evaluate on, which recipes do not give. Set 'no'.")
    if missing := set(plan.config.report_to) - set(get_available_reporting_integrations()):
        wrong.append(f"report_to: {', '.join(sorted(missing))} is not installed. Install it, or set 'none'.")
    return wrong


def check_batches(plan: StagePlan) -> str:
    whole_groups = METHODS[plan.values.trainer][1].whole_groups(plan.values)
    plan.batches = Batches.of(plan.values, plan.layout.processes, whole_groups)
    return str(plan.batches)


def describe_sampling(plan: StagePlan) -> str:
    batches = plan.batches
    parts = {
        what: most / batches.updates_per_generation
        for what, most in plan.config.most_sampled_tokens(batches.generation).items()
    }
    listed = ", ".join(f"{round(most):,} of {what}" for what, most in parts.items())
    return f"per update, at most {listed} (tokens)"


def check_rows(plan: StagePlan) -> str:
    arguments = plan.dataclass_of(TrainArguments)
    if arguments.dataset is None:
        return "none"
    reward_funcs = load_reward_funcs(arguments.reward_funcs)
    rows = load_rows(arguments)
    validate_rows(rows, needs_solution=reward_funcs is None, name="dataset")
    if plan.values.length_reward in TARGETS_IN_ROWS:
        validate_targets(rows, plan.values.length_reward)
    plan.rows = rows
    words = [f"{arguments.dataset} ({arguments.dataset_split}): {len(rows):,} rows of {', '.join(rows.column_names)}"]
    words += [f"system prompt {arguments.system_prompt!r}"] * (arguments.system_prompt is not None)
    if arguments.token_targets is not None:
        lowest, highest = arguments.token_targets
        most = "at most " * arguments.token_targets_at_most
        words.append(f"prompts ask for {most}{lowest:,} to {highest:,} tokens")
    if arguments.easy_prompts is not None:
        share = f"{arguments.easy_prompts:.0%} of the prompts that were always answered correctly are kept"
        words.append(f"{share}, by {describe_rollouts(plan)}")
    return ", ".join(words)


def describe_rollouts(plan: StagePlan) -> str:
    """Say whose rollouts a stage uses, and raise an error if no training has or will have recorded them."""
    folder = stage_folder(plan.values.output_dir or "", plan.number, plan.stages)
    recording = [stage for stage in plan.earlier if getattr(stage.values, "record_rollouts", False)]
    if plan.values.rollouts is None and recording:
        return f"the rollouts of stage {recording[-1].number}"
    source = earlier_rollouts(plan.dataclass_of(TrainArguments), folder)
    return f"{len(read_rollouts(source)):,} rollouts in {source}"


def check_model(plan: StagePlan) -> str:
    if plan.earlier:  # it starts from the model of the stage before
        first = plan.earlier[0]
        plan.model_config, plan.processor, plan.tokenizer = first.model_config, first.processor, first.tokenizer
        return f"that of stage {plan.number - 1}"
    model = plan.dataclass_of(ModelConfig)
    source = model_source(model.model_name_or_path)
    loading = {"revision": model.model_revision, "trust_remote_code": plan.values.trust_remote_code}
    plan.model_config = AutoConfig.from_pretrained(source, **loading)
    plan.processor = AutoProcessor.from_pretrained(source, **loading)
    plan.tokenizer = tokenizer_of(plan.processor)
    context = context_of(plan.model_config)
    return f"{model.model_name_or_path}: {plan.model_config.model_type}, {model.dtype}, context of {context:,} tokens"


def context_of(config: PretrainedConfig) -> int:
    return config.get_text_config().max_position_embeddings


def check_prompts(plan: StagePlan) -> str:
    rows, most = plan.rows, plan.values.max_completion_length
    context = context_of(plan.model_config)
    lengths = [prompt_length(prompt, plan.tokenizer) for prompt in sampled(rows["prompt"])]
    plan.longest_prompt = max(lengths)
    validate_prompt_lengths(rows, plan.tokenizer, context, most)
    return (
        f"{min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f} ({len(lengths):,} of "
        f"{len(rows):,}); with completions of {most:,} all fit the context of {context:,}"
    )


def sampled(rows: Sequence[Any]) -> Sequence[Any]:
    """Return elements that are evenly spread over all."""
    return rows[:: math.ceil(len(rows) / SAMPLED_PROMPTS)]


def check_updates(plan: StagePlan) -> str:
    values, batches, rows = plan.values, plan.batches, len(plan.rows)
    updates = batches.updates(rows, values.max_steps, values.num_train_epochs)
    completions = updates * batches.completions_per_update // batches.num_iterations
    return (
        f"{updates:,} of {batches.completions_per_update:,} completions each: {completions:,} completions, "
        f"{completions / batches.num_generations / rows:.2g} epochs over the rows"
    )


def check_servers(plan: StagePlan) -> str:
    values = plan.values
    if not values.use_vllm:
        return "none: completions are generated in process"
    if values.vllm_mode != "server":
        return f"none: vLLM runs in process, with {values.vllm_gpu_memory_utilization:.0%} of each GPU"
    # Use the fields, not a configuration, so that servers are checked even if another field is wrong.
    urls = server_urls(values.vllm_server_base_url, values.vllm_server_host, values.vllm_server_port)
    longest, wrong = (plan.longest_prompt or 1) + values.max_completion_length, []
    images = plan.rows is not None and {"image", "images"} & {*plan.rows.column_names}
    for url in urls:
        engine = VLLMServerEngine(
            url, plan.tokenizer, api_key=os.environ.get("VLLM_API_KEY"), retry_window=SERVER_SECONDS
        )
        check = engine.check(max_length=longest, policy_config=plan.model_config, weight_sync=values.weight_sync)
        try:
            run_to_end(check)
            if images:
                run_to_end(engine.check_images(plan.processor))
        except Exception as error:  # still check the other servers
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    further = ", the processor's tokens of images" * bool(images)
    further += ", the next batch is sampled during an update" * (values.rollouts_ahead == 1)
    return (
        f"{', '.join(urls)}: the policy's tokenizer and size, a context of {longest:,} tokens, processed "
        f"log-probabilities, weights by {values.weight_sync}{further}"
    )


def check_memory(plan: StagePlan) -> str:
    return compare(plan, workload(plan))


def workload(plan: StagePlan) -> Workload:
    """Return what a process computes and stores, from the results of the other checks."""
    values, config, batches = plan.values, plan.config, plan.batches
    generated = batches.generation // batches.processes
    at_once = min(generated, config.max_rollouts_in_flight or generated) if config.own_rollouts else generated
    return Workload(
        plan.dataclass_of(ModelConfig),
        plan.layout,
        max_length=plan.longest_prompt + values.max_completion_length,
        micro_batch=batches.per_device,
        has_reference=values.beta != 0.0,
        padded=batches.per_device > 1 or not values.reduce_padding,
        kept_completions=generated,
        cached_completions=0 if values.use_vllm else at_once,
        samples_whole=config.own_rollouts and not values.use_vllm,
        vllm_share=values.vllm_gpu_memory_utilization * (values.use_vllm and values.vllm_mode == "colocate"),
        **training_options(plan),
    )


def training_options(plan: StagePlan) -> dict[str, Any]:
    """Return the fields of a [`Workload`] that all trainings set in the same way."""
    config = plan.config
    accumulating = config.accelerator_config.gradient_accumulation_kwargs or {}
    shares_each = config.gradient_accumulation_steps == 1 or accumulating.get("sync_each_batch", False)
    return {
        "optimizer": plain(config.optim),
        "bf16": bool(config.bf16),
        "gradient_checkpointing": config.gradient_checkpointing,
        "accumulates_unshared": plan.layout.engine == "fsdp" and not shares_each,
    }


def compare(plan: StagePlan, work: Workload) -> str:
    """Describe the estimate, or raise an error if it does not fit."""
    estimate = estimate_memory(plan.model_config, work)
    room, where = plan.layout.gpu_memory, "of a GPU"
    if plan.values.use_cpu:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // plan.layout.processes
        where = "of this machine"
    plan.memory_is_known = room is not None
    if room is None:
        return f"{estimate}. No GPU is visible to compare with: give --gpu-memory."
    if estimate.total > room * (1 - RESERVE):
        ways = ", ".join(f"{field} (saves {size_text(count)})" for field, count in remedies(plan.model_config, work))
        raise ValueError(
            f"memory: {estimate}. It does not fit {size_text(room)} {where}, of which {RESERVE:.0%} are left for what "
            f"is not counted. Each of these lowers it: {ways}."
        )
    return f"{estimate}. That is {estimate.total / room:.0%} of {size_text(room)} {where}."


def output_folder(plan: StagePlan) -> Path:
    """Return the folder of a stage."""
    output_dir = plan.values.output_dir or "trainer_output"  # the default of transformers
    return stage_folder(output_dir, plan.number, plan.stages)


def check_output(plan: StagePlan) -> str:
    folder = output_folder(plan)
    if plan.stages == 1:
        if not plan.values.resume_from_checkpoint:
            check_output_dir(folder)
        return str(folder)
    if is_done(folder):
        return f"{folder}, which is done and is left as it is"
    return f"{folder}" + ", where an earlier run is resumed" * any(folder.glob("checkpoint-*"))


# The name of a line, its check, and the results of other checks that it needs.
Checks = tuple[tuple[str, Callable[[StagePlan], str], tuple[str, ...]], ...]
CHECKS: Checks = (
    ("fields", read_fields, ()),
    ("config", check_config, ("values",)),
    ("method", describe_method, ("config",)),
    ("model", check_model, ("values",)),
    ("data", check_rows, ("values",)),
    ("prompts", check_prompts, ("values", "rows", "tokenizer")),
    ("batches", check_batches, ("values",)),
    ("tokens", describe_sampling, ("batches", "config")),
    ("updates", check_updates, ("batches", "rows")),
    ("servers", check_servers, ("values", "tokenizer")),
    ("memory", check_memory, ("batches", "config", "model_config", "longest_prompt")),
    ("output", check_output, ("values",)),
)
