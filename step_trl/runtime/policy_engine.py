"""The engine that generates completions: the policy itself, vLLM in this process, or vLLM servers."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from ..monitor import RunStatus
from ..rollout import DynamicTruncatedRollout, SamplingParams, TruncationCallback
from ..rollout.engines import (
    Engine,
    EngineUnavailableError,
    TransformersEngine,
    VLLMColocatedEngine,
    VLLMServerEngine,
)
from ..rollout.event_loop import run_to_end
from .batches_ahead import BatchesAhead, Rows
from .ranks import check_reference_model, check_rollouts_in_process, failing_together, rollout_seeds, whole_parameters
from .rollouts_ahead import Request, RolloutsAhead, check_rollouts_ahead
from .run_config import RunConfig
from .weight_sync import DiskSyncedGeneration, check_log_probabilities


logger = logging.getLogger(__name__)


def loading_options(args: RunConfig) -> dict[str, Any]:
    """Return the options of `from_pretrained` for loading a model's configuration and tokenizer."""
    return {"trust_remote_code": args.trust_remote_code} | {
        name: value
        for name, value in cast("dict[str, Any]", args.model_init_kwargs or {}).items()
        if name in ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")
    }


def connect(
    args: RunConfig,
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> VLLMServerEngine:
    """Check the vLLM servers of a training, and return their engine."""
    config = model.config if not isinstance(model, str) else AutoConfig.from_pretrained(model, **loading_options(args))
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(get_config_model_id(config), **loading_options(args))
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    engine = VLLMServerEngine(
        args.server_urls(),
        tokenizer,
        api_key=os.environ.get("VLLM_API_KEY"),
        retry_window=args.vllm_server_timeout,
    )
    run_to_end(
        engine.check(
            max_length=1 + cast("int", args.max_completion_length),
            policy_config=config,
            weight_sync=args.weight_sync,
        )
    )
    return engine


class PolicyEngine:
    """
    The engine that samples from the current policy, the same for every method.

    It is created before TRL's constructor runs, so that a wrong server is refused before TRL opens a process group
    with it. The constructor runs within [`hidden_from_trl`], and the trainer is attached afterwards, by [`attach`].

    Attributes:
        servers ([`VLLMServerEngine`], *optional*):
            The engine of the vLLM servers, with `vllm_mode="server"`.
        colocated ([`VLLMColocatedEngine`], *optional*):
            The engine of TRL's vLLM in this process, with `vllm_mode="colocate"`, after [`check_own_rollouts`] has
            been called.
        ahead ([`RolloutsAhead`], *optional*), batches ([`BatchesAhead`], *optional*):
            The batch that is sampled during an update, and the batches that follow, with `rollouts_ahead=1`, after
            [`attach`].
    """

    def __init__(
        self,
        args: RunConfig,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ):
        on_servers = args.use_vllm and args.vllm_mode == "server"
        self.args = args
        self.servers = connect(args, model, processing_class) if on_servers else None
        self.colocated: VLLMColocatedEngine | None = None
        self.ahead: RolloutsAhead | None = None
        self.batches: BatchesAhead | None = None
        self._by_disk = on_servers and args.weight_sync == "disk"
        self._in_process: TransformersEngine | None = None
        self._weights_checked_at: int | None = None
        self._seeded_step, self._seeded_calls = -1, 0

    @contextmanager
    def hidden_from_trl(self) -> Iterator[None]:
        """
        Hide `use_vllm` from TRL's constructor if weights are synchronised over the disk.

        With it, `GRPOTrainer.__init__` creates a `VLLMGeneration` (`if self.use_vllm:`, under "Initialize vLLM
        generation backend"), which opens an NCCL process group with the server. [`attach`] creates one for the disk.
        """
        self.args.use_vllm = self.args.use_vllm and not self._by_disk
        try:
            yield
        finally:
            self.args.use_vllm = self.args.use_vllm or self._by_disk

    def attach(self, trainer: GRPOTrainer) -> None:
        """Attach the trainer, after TRL's constructor has run."""
        self._trainer = cast("GRPOTrainer", weakref.proxy(trainer))  # the trainer refers to this object, and is large
        if trainer._dist.fsdp_version == 2 and trainer.ref_model is not None:
            check_reference_model(trainer.accelerator.state.fsdp_plugin)
        if self.servers is not None and self._by_disk:
            trainer.use_vllm = True
            trainer._last_loaded_step = -1  # as in TRL: no weights have been sent yet
            trainer.vllm_generation = DiskSyncedGeneration.of(
                trainer,
                engine=self.servers,
                folder=self.args.weight_sync_dir or os.path.join(cast("str", self.args.output_dir), "weight_sync"),
                generate_together=not trainer.tools,
            )
        if self.args.rollouts_ahead:
            check_rollouts_ahead(trainer, self.args.weight_sync_check_every)
            self.ahead, self.batches = RolloutsAhead(self._trainer), BatchesAhead(self._trainer)

    def check_own_rollouts(self, *, with_images: bool = False) -> None:
        """
        Refuse what rollouts with [`sampling`] do not support. Trainers with their own rollouts call this.

        `with_images` says that the trainer passes the images of its prompts to the engine.
        """
        trainer = self._trainer
        if isinstance(trainer.processing_class, ProcessorMixin):
            if not with_images:
                raise ValueError(
                    "processing_class: the rollouts of this method are for text models, but this is multimodal. Use a "
                    "text model, or a method that samples with images: GRPO, SAS, or Step-GRPO."
                )
            if trainer.use_vllm and self.servers is None:
                raise ValueError(
                    "vllm_mode: truncated rollouts with images are not supported by vLLM in this process. Set "
                    "vllm_mode='server' or use_vllm=False, or sample with TRL: GRPO, SAS, or Step-GRPO with "
                    "truncated_rollout=False."
                )
            if self.servers is not None:
                run_to_end(self.servers.check_images(trainer.processing_class))
        if not trainer.use_vllm:
            check_rollouts_in_process(
                trainer._dist.zero_stage, trainer._dist.fsdp_version, self.args.ds3_gather_for_generation
            )
        elif self.servers is None:
            self.colocated = VLLMColocatedEngine(trainer.vllm_generation.llm, trainer._tokenizer)

    @property
    def max_length(self) -> int:
        """Return the number of tokens that a prompt and its completion can have together."""
        config = cast("PreTrainedModel", self._trainer.model).config.get_text_config()
        of_policy = getattr(config, "max_position_embeddings", None) or sys.maxsize
        vllm_engine = self.servers or self.colocated
        return of_policy if vllm_engine is None else min(of_policy, vllm_engine.max_length)

    @property
    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the trainer's completions."""
        trainer = self._trainer
        return SamplingParams(
            cast("int", trainer.max_completion_length),
            trainer.temperature,
            trainer.top_p,
            trainer.top_k or 0,
            trainer.min_p or 0.0,
        )

    def seeds(self, count: int) -> list[int] | None:
        """
        Return the seeds of this process's next `count` completions, or `None` if they are not seeded.

        They depend on the run's seed, the update, the number of earlier calls in this update, and the positions of the
        completions in the batch of all processes, not on the number of processes.
        """
        step = self._trainer.state.global_step
        self._seeded_calls = self._seeded_calls + 1 if step == self._seeded_step else 0
        self._seeded_step = step
        return self._seeds_of(step, self._seeded_calls, count)

    def _seeds_of(self, step: int, call: int, count: int) -> list[int] | None:
        trainer = self._trainer
        seeded = not trainer.use_vllm if self.args.seeded_rollouts is None else self.args.seeded_rollouts
        first = trainer.accelerator.process_index * count
        return rollout_seeds([self.args.seed, step, call], first, count) if seeded else None

    def rollout(
        self, engine: Engine, callbacks: Sequence[TruncationCallback], speculative: bool
    ) -> DynamicTruncatedRollout:
        """Return the rollout of the trainer's completions on an engine."""
        return DynamicTruncatedRollout(
            engine,
            callbacks,
            self.sampling_params,
            # TRL's colocated vLLM has a slot for each completion, and a probe beside it would wait for another's.
            speculative and self.colocated is None,
            max_in_flight=self.args.max_rollouts_in_flight,
        )

    def sample_ahead(
        self,
        rows: Rows,
        options: Mapping[str, Any],
        tokenize: Callable[[list[Any]], list[list[int]]],
        status: RunStatus,
    ) -> None:
        """
        Begin to sample the batch after that of `rows`, with the current weights, if there is one.

        `options` are those of [`rollout`]. Every process must call this, when it has the completions of `rows`.
        """
        ahead, batches, servers = self.ahead, self.batches, self.servers
        assert ahead is not None and batches is not None and servers is not None
        following = batches.after(rows)
        if following is None or self._is_to_be_compared(following.update):
            return
        prompts = tokenize([row["prompt"] for row in following.rows])
        same_update = following.update == self._seeded_step
        seeds = self._seeds_of(following.update, self._seeded_calls + 1 if same_update else 0, len(prompts))
        request = Request(prompts, seeds, **options)
        self.sync_weights()
        ahead.start(request, self.rollout(servers, request.callbacks, request.speculative), status)

    @contextmanager
    def sampling(self) -> Iterator[Engine]:
        """
        Update the engine with the policy's current weights, and yield it. Every process must enter.

        An error in one process ends the block in all of them, except with tools: then processes enter a different
        number of times, and cannot wait for each other.
        """
        with nullcontext() if self._trainer.tools else failing_together():
            vllm_engine = self.servers or self.colocated
            if vllm_engine is not None:
                self.sync_weights()
                yield vllm_engine
            else:
                with self._unwrapped_policy() as engine:
                    yield engine

    @contextmanager
    def _unwrapped_policy(self) -> Iterator[Engine]:
        trainer = self._trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=cast("dict | None", self.args.gradient_checkpointing_kwargs),
            ) as model,
            whole_parameters(trainer),
        ):
            if self._in_process is None:
                self._in_process = TransformersEngine(model, trainer._tokenizer)
            try:
                yield self._in_process
            finally:
                self._in_process.drop_prefix_cache()  # the weights are about to change

    def close(self) -> None:
        """Stop what is sampled in the background."""
        if self.ahead is not None:
            self.ahead.cancel()

    def sync_weights(self) -> None:
        """Send the policy's weights to vLLM if it has moved since, as TRL's `_generate_single_turn` does."""
        trainer = self._trainer
        if trainer.state.global_step != trainer._last_loaded_step:
            if self.ahead is not None:
                self.ahead.settle()
            # In TRL, the first process sends the weights and then requests completions. Here each process requests its
            # own, and must wait until all weights are sent: a forward pass with half of them crashes the server.
            with failing_together():
                trainer.vllm_generation.sync_weights()
                by_nccl = None if self._by_disk else self.servers  # over the disk, the engine has done this
                if by_nccl is not None and trainer._is_vlm and trainer.accelerator.is_main_process:
                    run_to_end(by_nccl.forget_images())
            trainer._last_loaded_step = trainer.state.global_step

    def check_weights(self, output: Mapping[str, torch.Tensor]) -> None:
        """
        Compare the servers' log-probabilities with the policy's, every `weight_sync_check_every` updates.

        TRL's `output` for a generation holds the policy's if TRL corrects for those of the servers. Raises
        [`WeightSyncError`] on every process if they differ. A batch that older weights have sampled is not compared.
        """
        trainer, model = self._trainer, cast("PreTrainedModel", self._trainer.model)
        step, is_stale = trainer.state.global_step, model.training and self._staleness > 0
        is_due = self._comparison_is_due(step, self._weights_checked_at)
        if self.servers is None or not is_due or is_stale or "old_per_token_logps" not in output:
            return
        self._weights_checked_at = step
        with failing_together():
            check_log_probabilities(
                output["sampling_per_token_logps"],
                output["old_per_token_logps"],
                output["completion_mask"],
                support_is_whole=trainer.top_p == 1.0 and not trainer.top_k and not trainer.min_p,
                tolerance=0.01 if model.dtype == torch.float32 else 0.1,
                tied_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
                urls=self.args.server_urls(),
            )

    @property
    def _staleness(self) -> int:
        return 0 if self.ahead is None else self.ahead.staleness

    def _comparison_is_due(self, step: int, last: int | None) -> bool:
        every = self.args.weight_sync_check_every
        return every > 0 and (last is None or step - last >= every)

    def _is_to_be_compared(self, update: int) -> bool:
        """Return whether the batch of a later update must be sampled with its own weights, for [`check_weights`]."""
        last, step = self._weights_checked_at, self._trainer.state.global_step
        if self._staleness == 0 and self._comparison_is_due(step, last):
            last = step  # the batch that has just been sampled is about to be compared
        return self._comparison_is_due(update, last)

    @contextmanager
    def saving_on_outage(self) -> Iterator[None]:
        """Save a checkpoint if a server remains unreachable, so that no training is lost."""
        try:
            yield
        except EngineUnavailableError:  # raised on every process, between two updates
            trainer = self._trainer
            if trainer.state.global_step > 0:
                trainer._save_checkpoint(trainer.model, trial=None)
                logger.error(
                    "Saved %s. When a server answers again, resume with train(resume_from_checkpoint=True).",
                    os.path.join(cast("str", self.args.output_dir), f"checkpoint-{trainer.state.global_step}"),
                )
            raise
