"""
The pipeline that all methods share. By itself, it is GRPO with a length reward.

    rows -> SAMPLE -> completions -> REWARD COLUMNS -> advantages -> CREDIT -> BEFORE LOSS -> loss

A method overrides some of the four hooks `sample`, `reward_columns`, `credit` and `before_loss`. Everything else stays
here, including TRL's own hooks. What any long run needs is an attribute, not inherited: see `runtime/` and `monitor/`.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer, is_conversational
from trl.chat_template_utils import parse_response
from trl.models.utils import disable_gradient_checkpointing

from ..losses import uncertain_tokens
from ..monitor import Monitor, RunStatus, TrackerCallback
from ..monitor.trace import Trace
from ..monitor.workspace import Charts
from ..preferences.records import RolloutRecorder
from ..rewards.length_rewards import length_term
from ..rollout import Rollout, SamplingParams, TruncationCallback
from ..rollout.engines import Engine, PromptImages
from ..rollout.engines.grouped_attention import reading_shared_keys_once
from ..runtime.checkpoints import load_method_state, resume_rollouts, save_method_state, save_unused_rollouts
from ..runtime.micro_batches import reduce_padding
from ..runtime.model_card import describe_training
from ..runtime.policy_engine import PolicyEngine
from ..runtime.rollouts_ahead import Request, RolloutsAhead
from ..runtime.signal_warnings import SignalWarnings, Symptom
from ..thoughts import skipped_thoughts
from ..token_targets import TARGET_COLUMN
from .arguments import check_datasets, checked_args, datasets_by_name, default_reward, no_reward_yet, own_list
from .base_config import EfficientReasoningConfig
from .batch import Batch


class EfficientReasoningTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] that knows which completions are correct, with an optional length reward from the papers'
    baselines. It is the base class of all other trainers.

    The first reward function is the correctness signal: a completion is correct when it returns more than 0.5. Without
    reward functions, the signal is the environment's own reward if there is one, and otherwise math accuracy against
    the row's `solution`.

    A completion whose reward functions all return `None` counts as not correct, and is not trained on, as in TRL: the
    columns that our trainers add are `None`, too.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            The reward functions, by default math accuracy. The first one tells which completions are correct (more
            than 0.5).
        args ([`EfficientReasoningConfig`], *optional*):
            The configuration. Its `length_reward` names the length reward. Without one, this is GRPO.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt`; with `solution` for the default reward; with `target_tokens` for L1.
        eval_dataset, processing_class, reward_processing_classes (*optional*):
            As in [`~trl.GRPOTrainer`].
        **kwargs:
            Further arguments of [`~trl.GRPOTrainer`].

    Attributes:
        batch ([`~step_trl.trainers.batch.Batch`]):
            The current or the last generation batch.
        monitor ([`~step_trl.monitor.Monitor`]):
            The monitor that displays the training.

    Example:

    ```python
    from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer
    from step_trl.testbed import load_dataset, load_model, load_tokenizer

    trainer = EfficientReasoningTrainer(
        load_model(),
        args=EfficientReasoningConfig("kimi", length_reward="kimi", max_completion_length=400, bf16=False),
        train_dataset=load_dataset("train"),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    ```
    """

    config_class: ClassVar[type[EfficientReasoningConfig]] = EfficientReasoningConfig
    metric_prefixes: ClassVar[tuple[str, ...]] = ()  # prefixes of the metrics that only this method has
    charts: ClassVar[Charts] = {}  # charts that only this method has, see `monitor/workspace.py`
    symptoms: ClassVar[tuple[Symptom, ...]] = ()  # symptoms of a run without a signal that only this method has
    model_files: ClassVar[tuple[str, ...]] = ()  # files that the method saves beside a model's weights
    args: EfficientReasoningConfig
    model: PreTrainedModel
    batch: Batch
    monitor: Monitor
    _tokenizer: PreTrainedTokenizerBase
    _needs_solution: ClassVar[bool] = False  # whether the method reads it, whatever the reward functions are
    _correctness_columns: int = 1  # how many of the first reward columns tell correctness
    _train_sampler: Sampler | None = None  # `None` with an iterable data set
    _loss_inputs: dict[str, Any] | None = None  # of the loss whose forward pass is running

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        **kwargs,
    ):
        args = checked_args(type(self), self.config_class, model, args, has_reward_funcs=reward_funcs is not None)
        if kwargs.get("environment_factory") is None:  # otherwise the environment owns the prompts
            datasets = datasets_by_name(train_dataset, eval_dataset)
            needs_solution = self._needs_solution or reward_funcs is None
            check_datasets(model, args, datasets, processing_class, needs_solution=needs_solution)
        self._policy_engine = PolicyEngine(args, model, processing_class)
        with self._policy_engine.hidden_from_trl():
            super().__init__(
                model,
                default_reward(args) if reward_funcs is None else own_list(reward_funcs),
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=own_list(reward_processing_classes),
                **kwargs,
            )
        self._policy_engine.attach(self)
        if self.args.rollouts_ahead:
            self._check_that_it_samples_ahead()
        if reward_funcs is None:
            self._prefer_the_environments_rewards()
        self._recorder = RolloutRecorder(cast("str", self.args.output_dir), self._tokenizer)
        self._follow()
        self.add_callback(SignalWarnings(self.symptoms))
        if self.args.length_reward is not None:
            self._add_reward_column(self._length_column, self.args.length_reward_weight)

    def choose_rows(self, batch: Batch) -> Sequence[dict[str, Any]]:
        """
        Return the rows to generate from, one for each completion, by default those that TRL has sampled.

        This is called for each generation in training, before the hooks. It may read `batch.rows` and
        `num_generations`.
        """
        return batch.rows

    # The four hooks, in the order in which they are called.

    def sample(self, batch: Batch) -> list[Rollout] | None:
        """
        Generate the training completions of `batch.prompt_ids`, one for each prompt.

        This is called for each generation in training, and with tools for each turn. It may read `batch.rows`,
        `prompt_ids` and `num_generations`; [`policy_engine`] yields an engine with the policy's weights.

        Returns:
            `list[Rollout]`, or `None` to let TRL generate. Rollouts may have other prompts than those of the batch; a
            method that returns such must also set `batch.rows` and `batch.rewards`.
        """
        return None

    def rollout_options(self) -> dict[str, Any]:
        """
        Return the arguments of [`run_rollouts`] besides prompts and seeds, with which `sample` calls it for a batch.

        With `rollouts_ahead=1`, the next batch is requested with them. A method that overrides [`sample`] must
        override this, too, for its rollouts to be sampled ahead: `sample` then finds them ready.
        """
        return {}

    def reward_columns(self, batch: Batch) -> dict[str, torch.Tensor]:
        """
        Return reward columns that depend on more than one completion, or on more than its text.

        This is called after the reward functions, when their values have been gathered. It may read `batch.correct`,
        `groups`, `completions`, `completion_ids`, `rows` and `rollouts`. Columns must have been added with
        `_add_reward_column`.

        Returns:
            `dict[str, torch.Tensor]`: The rewards `(B_global,)` by column name.
        """
        return {} if self.args.length_reward is None else {self._length_column: self._length_rewards(batch)}

    def credit(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """
        Return the advantages for the loss, by default TRL's.

        This may read all of `batch`, add tensors to `batch.inputs`, and leave tokens out with `batch.exclude`.

        Args:
            batch ([`Batch`]):
                The generation batch.
            advantages (`torch.Tensor` of shape `(B,)`):
                TRL's advantages of this process's completions.

        Returns:
            `torch.Tensor` of shape `(B,)` or `(B, T)`
        """
        return advantages

    def before_loss(self, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """
        Change what the loss reads after its forward pass: advantages, and old and reference log-probabilities.

        This is called once per micro-batch and iteration, between the loss's own forward pass and the loss.

        Args:
            inputs (`dict[str, Any]`):
                A copy of the micro-batch: `advantages`, `completion_ids`, `completion_mask`, `correct`, `unscorable`
                and whatever [`credit`] has added.
            logps (`torch.Tensor` of shape `(B, T)`):
                The policy's log-probabilities, detached.
        """

    # What a method has to keep, if it keeps something between two generations.

    def method_state(self) -> dict[str, Any] | None:
        """Return what a checkpoint must keep of the method on this process: built-in types and tensors."""
        return None

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Resume with what [`method_state`] has returned."""

    # What the hooks may use.

    def policy_engine(self) -> AbstractContextManager[Engine]:
        """Return a context manager that yields an engine with the policy's weights. Every process must enter."""
        return self._policy_engine.sampling()

    def run_rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        callbacks: Sequence[TruncationCallback] = (),
        *,
        speculative: bool = False,
        seeds: Sequence[int] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """
        Sample a completion of each prompt from the policy, with the trainer's sampling parameters.

        Every process must call this; each may have another number of prompts. The arguments are those of
        [`~step_trl.rollout.DynamicTruncatedRollout`].
        """
        ahead, rollouts = self._policy_engine.ahead, None
        if ahead is not None and budgets is None:
            rollouts = ahead.take(Request(prompts, seeds, callbacks, speculative))
        if rollouts is None:
            with self.policy_engine() as engine:
                images = self.batch.images  # their prompts are those of the batch
                asked = prompts if images is None else engine.with_images(prompts, images)
                rollout = self._policy_engine.rollout(engine, callbacks, speculative)
                with self.status.following(rollout, len(prompts)) as note:
                    rollouts = rollout.run(asked, seeds, note, budgets)
        for done, prompt in zip(rollouts, prompts, strict=True):
            done.prompt_ids = prompt
        return rollouts

    @property
    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the completions."""
        return self._policy_engine.sampling_params

    def seeds(self, count: int) -> list[int] | None:
        """Return seeds for this process's next `count` completions, or `None` if they are not seeded."""
        return self._policy_engine.seeds(count)

    def score(
        self,
        completion_ids: list[list[int]],
        rows: Sequence[dict[str, Any]],
        prompt_ids: list[list[int]],
    ) -> torch.Tensor:
        """
        Return the rewards `(N, F)` of further completions under each reward function, NaN where it returns `None`.

        Nothing is logged. Every process must call this; each may have another number of completions.

        Args:
            completion_ids (`list[list[int]]` of length N):
                The token ids of the completions.
            rows (`Sequence[dict[str, Any]]` of length N):
                The row of the data set that each of them belongs to.
            prompt_ids (`list[list[int]]` of length N):
                The token ids of their prompts.
        """
        most = max(1, *gather_object([len(rows)]))
        missing = most - len(rows)  # TRL gathers as many from each process
        all_rows = [*rows, *[self.batch.rows[0]] * missing]
        all_ids = [*completion_ids, *[[self._tokenizer.pad_token_id]] * missing]
        all_prompt_ids = [*prompt_ids, *[[self._tokenizer.pad_token_id]] * missing]
        logged = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            prompts = [row["prompt"] for row in all_rows]
            completions = self._as_completions(prompts, all_prompt_ids, all_ids)
            columns = super()._calculate_rewards(all_rows, prompts, completions, all_ids)
        finally:
            self._pending_extra_logs, self._pending_metrics = logged
        return self.batch.local(columns)[: len(rows)]

    def are_correct(self, columns: torch.Tensor) -> torch.Tensor:
        """Return which completions `(N,)` are correct, given their rewards `(N, F)` under each reward function."""
        return (columns[:, : self._correctness_columns] > 0.5).any(dim=1)  # NaN is not

    def weighted_sum(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the reward `(N,)` that reward columns `(N, F)` add up to, as in TRL. It is 0 if all are NaN."""
        return (columns * self.reward_weights.to(columns.device)).nansum(dim=1)

    def old_logps(self, batch: Batch) -> torch.Tensor:
        """
        Return the log-probabilities `(B, T)` of this process's completions under the policy that sampled them.

        Call this only in [`credit`]. It takes a forward pass if TRL has not computed them.
        """
        inputs = batch.inputs
        if batch.old_logps is None:
            batch.old_logps = inputs.get("old_per_token_logps")
        if batch.old_logps is not None:
            return batch.old_logps
        forward = {name: inputs[name] for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
        if "pixel_values" in inputs:
            raise ValueError(
                "images: log-probabilities under the old policy are not computed with images. Set num_iterations=2 or "
                "use_vllm=True, with which TRL computes them."
            )
        checkpointing = cast("dict | None", self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            batch.old_logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **forward,
            )
        return batch.old_logps

    @property
    def status(self) -> RunStatus:
        """Return the status of the training."""
        return self.monitor.status

    def completion_traces(self, number: int) -> list[Trace]:
        """Render the first completions of the last generation, with their advantages."""
        return self.monitor.traces(number)

    def log_masked_means(self, values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Log means over the completions of all processes. Every process must call this.

        Args:
            values (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
                For each name, a tensor and a mask of its shape. Masked values may be NaN. An empty mean is not logged.
        """
        totals = [
            torch.stack([torch.where(mask, value, 0).sum().float(), mask.sum().float()])
            for value, mask in values.values()
        ]
        totals = self.accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        for name, (total, count) in zip(values, totals, strict=True):
            if count:
                self.log_metric(name, total / count)

    def logps_of(self, prompt: list[int], completion: list[int]) -> torch.Tensor:
        """Return the policy's log-probabilities `(1, T)` of a completion, with gradients if they are switched on."""
        ids = torch.tensor([[*prompt, *completion]], device=self.accelerator.device)
        return self._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), len(completion))[0]

    def tokenize_prompts(self, prompts: list[Any]) -> list[list[int]]:
        """Return the token ids of prompts, which are texts or messages, as TRL tokenizes them."""
        return self._tokenize_prompts(prompts)[0] if prompts else []

    def log_metric(self, name: str, value: float) -> None:
        """Log a value that is the same on all processes."""
        self._metrics[self._mode][name].append(value)

    def _add_reward_column(self, name: str, weight: float) -> None:
        """Add a column that [`reward_columns`] fills in."""
        self.reward_func_names.append(name)
        self.reward_funcs.append(no_reward_yet)  # type: ignore[arg-type]  # TRL's type has no list of None alone
        self.reward_processing_classes.append(None)  # type: ignore[arg-type]  # as TRL's own for functions
        self.reward_weights = torch.cat([self.reward_weights, self.reward_weights.new_tensor([weight])])

    def _as_completions(
        self, prompts: Sequence[Any], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> list[Any]:
        """Decode completions as TRL's `_generate` does: to messages if the prompts consist of messages."""
        if not is_conversational({"prompt": prompts[0]}):
            return self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if any(getattr(self._tokenizer, name, None) for name in ("response_template", "response_schema")):
            return [
                [parse_response(self._tokenizer, ids, prefix=prefix)]
                for prefix, ids in zip(prompt_ids, completion_ids, strict=True)
            ]
        texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _check_own_rollouts(self) -> None:
        """Refuse what a method that samples by itself does not support."""
        for name, given in (("rollout_func", self.rollout_func), ("tools", self.tools)):
            if given:
                raise ValueError(f"{name}: {self._name} samples completions itself. Leave it out, or use GRPO.")
        self._policy_engine.check_own_rollouts()

    def _check_that_it_samples_ahead(self) -> None:
        """Refuse a method whose rollouts are not those of [`rollout_options`]."""
        kinds = type(self).__mro__
        chooses, samples, describes = (
            next(kind for kind in kinds if name in vars(kind)) for name in ("choose_rows", "sample", "rollout_options")
        )
        if chooses is not EfficientReasoningTrainer or samples is not describes:
            raise ValueError(
                f"rollouts_ahead: {self.args.rollouts_ahead} is not supported by {self._name}, which samples in its "
                "own way. Set rollouts_ahead=0."
            )

    @property
    def _mode(self) -> str:
        """Return the key of `_metrics`, as TRL's hooks compute it."""
        return "train" if self.model.training else "eval"

    # The length reward.

    @property
    def _length_column(self) -> str:
        return f"{self.args.length_reward}_length_reward"

    def _length_rewards(self, batch: Batch) -> torch.Tensor:
        """Return the length reward `(B_global,)` without the correctness."""
        rows = [
            (len(ids), ids[-1] in self.eos_token_ids, target)
            for ids, target in zip(batch.completion_ids, self._length_targets(batch), strict=True)
        ]
        lengths, ended, targets = batch.gather(rows).T
        return length_term(
            cast("str", self.args.length_reward),
            self.args.length_options(),
            lengths=lengths,
            correct=batch.correct,
            num_generations=batch.num_generations,
            ended=ended.bool(),
            targets=targets,
            max_completion_length=cast("int", self.max_completion_length),
        )

    def _length_targets(self, batch: Batch) -> list[int]:
        """Return the number of tokens that each prompt of this process asks for, 0 where it does not."""
        return [row.get(TARGET_COLUMN, 0) for row in batch.rows]

    # Before the training.

    def _prefer_the_environments_rewards(self) -> None:
        """Drop the default reward if TRL has added rewards of environments, which have a column per class."""
        environments = len(self.reward_funcs) - 1
        if environments == 0:
            return
        for columns in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            del columns[0]
        self.reward_weights = self.reward_weights[1:]
        self._correctness_columns = environments

    def _follow(self) -> None:
        """Display the training, and what it logs."""
        args = self.args
        self.monitor = Monitor(
            self._name,
            self._headline(),
            self._tokenizer,
            args,
            args.num_completions_to_log,
            self.accelerator.is_main_process,
        )
        for replaced in self.monitor.replaced:
            self.remove_callback(replaced)
        trackers = TrackerCallback(
            self.monitor, args.symbols(), self._logs, args.num_completions_to_log, self.callback_handler
        )
        for callback in (*self.monitor.callbacks, trackers):
            self.add_callback(callback)

    def _headline(self) -> dict[str, str]:
        """Return the keys of the most important metrics, by their labels."""
        return {
            "reward": "reward",
            "accuracy": f"rewards/{self.reward_func_names[0]}/mean",
            "tokens": "completions/mean_length",
        }

    # TRL's hooks, which call ours.

    def train(self, *args, **kwargs):
        try:
            with self._policy_engine.saving_on_outage():
                return super().train(*args, **kwargs)
        finally:
            self._policy_engine.close()
            self.monitor.close()

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        self.status.enter("rollouts" if training else "evaluation")
        num_generations = cast("int", self.num_generations if training else self.num_generations_eval)
        self.batch = batch = Batch(self.accelerator, inputs, num_generations, training)
        if training:
            batch.rows = inputs = self.choose_rows(batch)
        output = super()._generate_and_score_completions(inputs)
        if batch.rewards is not None:  # of other prompts than TRL has logged
            logged = cast("deque[str]", self._logs["prompt"])
            logged.extend(gather_object(self._tokenizer.batch_decode(batch.prompt_ids)))
        output |= {"correct": batch.local(batch.correct), "unscorable": batch.local(batch.unscorable)}
        self._policy_engine.check_weights(output)
        if training:
            self.monitor.note_generation(output, batch.rollouts)
        batch.inputs = output
        output["advantages"] = self.credit(batch, output["advantages"])
        if training and self.args.probability_mask is not None:
            batch.exclude(~uncertain_tokens(self.old_logps(batch), self.args.probability_mask))
        batch.inputs, batch.old_logps = {}, None  # these tensors are large
        if training:
            if self.args.record_rollouts:
                self._record(batch)
            self.status.enter("update")
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        self.batch.prompt_ids = prompt_ids
        if images is not None:
            self.batch.images = PromptImages.of(self.processing_class, images, multimodal_fields)
        if self._policy_engine.ahead is not None:
            rollouts = self._sample_with_overlap(self.batch, self._policy_engine.ahead)
        else:
            rollouts = self.sample(self.batch) if self.model.training else None
        if rollouts is None:
            with reading_shared_keys_once():
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
        prompt_ids[:] = [list(rollout.prompt_ids) for rollout in rollouts]
        self.batch.rollouts = None if self.tools else rollouts
        return [rollout.completion_ids for rollout in rollouts], [rollout.logprobs.tolist() for rollout in rollouts]

    def _sample_with_overlap(self, batch: Batch, ahead: RolloutsAhead) -> list[Rollout] | None:
        """Return training completions, and begin to sample those of the next batch."""
        if not batch.training:
            self._policy_engine.sync_weights()  # before TRL does, which would not wait for the batch in the background
            return None
        began = time.monotonic()
        rollouts = self.sample(batch)
        if rollouts is None:  # TRL would generate, but not in the background
            rollouts = self.run_rollouts(batch.prompt_ids, seeds=self.seeds(len(batch.prompt_ids)))
        self.log_metric("rollouts_ahead/waited", time.monotonic() - began)
        self.log_metric("rollouts_ahead/staleness", ahead.staleness)
        self._policy_engine.sample_ahead(batch.rows, self.rollout_options(), self.tokenize_prompts, self.status)
        return rollouts

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        batch = self.batch
        if batch.training:
            self.status.enter("rewards")
        if batch.rewards is None:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            rewards_per_func = batch.gather(batch.rewards)
        batch.completions, batch.completion_ids = completions, completion_ids_list
        batch.correct = self.are_correct(rewards_per_func)
        batch.unscorable = rewards_per_func.isnan().all(dim=1)
        batch.scores = self.weighted_sum(rewards_per_func)
        self._note_verdicts(batch)
        skipped = torch.tensor(skipped_thoughts(completions), device=batch.scores.device)
        self.log_masked_means({"completions/skip_ratio": (skipped.float(), torch.ones_like(skipped))})
        for name, rewards in self.reward_columns(batch).items():
            # NaN if all others are, so that TRL leaves the row out.
            scored = rewards.to(rewards_per_func).masked_fill(batch.unscorable, torch.nan)
            rewards_per_func[:, self.reward_func_names.index(name)] = scored
        return rewards_per_func

    def _record(self, batch: Batch) -> None:
        """Write the rollouts of all processes to `rollouts/` in `output_dir`."""
        described = self._recorder.describe(
            batch.rows,
            batch.completions,
            group=batch.local(batch.groups).tolist(),
            reward=batch.local(batch.scores).tolist(),
            correct=batch.local(batch.correct).tolist(),
            truncated=[ids[-1] not in self.eos_token_ids for ids in batch.completion_ids],
            prompt_tokens=[len(ids) for ids in batch.prompt_ids],
            tokens=[len(ids) for ids in batch.completion_ids],
        )
        rollouts = gather_object(described)
        if self.accelerator.is_main_process:
            self._recorder.write(self.state.global_step + 1, rollouts)

    def _note_verdicts(self, batch: Batch) -> None:
        """Add the verdicts and solutions of this process's completions to the tables that are logged."""
        columns: dict[str, list[Any]] = {"correct": batch.local(batch.correct).tolist()}
        if batch.training:
            self.monitor.note_verdicts(batch.rows, columns["correct"])
        if any(row.get("solution") is not None for row in batch.rows):
            columns["solution"] = [row.get("solution") for row in batch.rows]
        for name, values in columns.items():
            if name not in self._pending_extra_logs:  # a reward function may have a column with this name
                self._log_completion_extra(name, values)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self._policy_engine.batches
        source = epoch_iterator if batches is None else batches.of_epoch(epoch_iterator)
        return super().get_batch_samples(source, num_batches, device)

    def _prepare_inputs(self, generation_batch):
        steps_per_generation = cast("int", self.args.steps_per_generation)  # TRL has filled it in
        generate_every = steps_per_generation * self.num_iterations
        generates = self.model.training and (self._step % generate_every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        if not generates or self._buffered_inputs is None or not self.args.reduce_padding:
            return inputs
        self._buffered_inputs = reduce_padding(self, self._buffered_inputs)
        return self._buffered_inputs[self._step % steps_per_generation]

    def _compute_loss(self, model, inputs):
        # `before_loss` needs the inputs of a loss and its log-probabilities, and no method of TRL has both. The
        # inputs are stored here until the next log-probabilities are computed, which are this loss's: others are
        # computed when TRL generates. TRL reads what `before_loss` may change only afterwards
        # (tests/trainers/test_hooks.py checks the order).
        self._loss_inputs = inputs = dict(inputs)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, self._loss_inputs = self._loss_inputs, None
        if inputs is not None:
            _keep_kl_to_sampled_tokens(inputs, logps.detach())
            self.before_loss(inputs, logps.detach())
            self.monitor.note_loss(inputs, logps.detach())
        return logps, entropies, aux_loss

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        save_unused_rollouts(self, folder)
        save_method_state(folder, self.accelerator, self.method_state())
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            resume_rollouts(self, self._train_sampler, Path(checkpoint))
            state = load_method_state(Path(checkpoint), self.accelerator)
            if state is not None:
                self.load_method_state(state)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # TRL's
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            card = Path(cast("str", self.args.output_dir)) / "README.md"
            text = describe_training(
                card.read_text(encoding="utf-8"),
                self.args,
                self.args.method_options(),
                self.metric_prefixes,
                self.state.log_history,
            )
            card.write_text(text, encoding="utf-8")


def _keep_kl_to_sampled_tokens(inputs: dict[str, Any], logps: torch.Tensor) -> None:
    """
    Leave tokens that the policy did not sample out of the KL term, which is an estimate over sampled tokens.

    Otherwise, it would be exp(15) for an injected token that the reference expects and the policy has unlearned.
    """
    if "sampling_per_token_logps" in inputs and "ref_per_token_logps" in inputs:
        sampled = ~inputs["sampling_per_token_logps"].isnan()
        inputs["ref_per_token_logps"] = torch.where(sampled, inputs["ref_per_token_logps"], logps)
