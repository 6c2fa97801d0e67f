"""A policy that vLLM servers sample from: connection, weights, and what happens when a server is gone."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ..rollout.engines import EngineUnavailableError, VLLMServerEngine
from ..rollout.event_loop import run_to_end
from ..runtime.ranks import failing_together
from ..runtime.weight_sync import DiskSyncedGeneration, check_log_probabilities
from .base_config import EfficientReasoningConfig
from .followed import FollowedTrainer


logger = logging.getLogger(__name__)


def loading_options(args: EfficientReasoningConfig) -> dict[str, Any]:
    """Those of `from_pretrained` that say where a model's configuration and tokenizer come from."""
    return {"trust_remote_code": args.trust_remote_code} | {
        name: value
        for name, value in cast("dict[str, Any]", args.model_init_kwargs or {}).items()
        if name in ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")
    }


def connect(
    args: EfficientReasoningConfig,
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> VLLMServerEngine:
    """The engine over the servers of a training, once they are checked."""
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


class ServedTrainer(FollowedTrainer):
    """[`~trl.GRPOTrainer`] with checked servers, and with a second way to give them the policy's weights."""

    args: EfficientReasoningConfig

    def __init__(self, model, reward_funcs, args, **kwargs):
        on_servers = args.use_vllm and args.vllm_mode == "server"
        # Before TRL opens a process group with a server that may be the wrong one.
        self._server_engine = connect(args, model, kwargs.get("processing_class")) if on_servers else None
        by_disk = on_servers and args.weight_sync == "disk"
        args.use_vllm = args.use_vllm and not by_disk  # or TRL opens a process group with the server
        try:
            super().__init__(model, reward_funcs, args=args, **kwargs)
        finally:
            args.use_vllm = args.use_vllm or by_disk
        self._weights_checked_at: int | None = None
        if self._server_engine is not None and by_disk:
            self.use_vllm = True
            self._last_loaded_step = -1  # as TRL: no weights were sent yet
            self.vllm_generation = self._disk_synced_generation(self._server_engine)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except EngineUnavailableError:
            # Raised on every process, between two updates: nothing that was trained is lost.
            if self.state.global_step > 0:
                self._save_checkpoint(self.model, trial=None)
                logger.error(
                    "Saved %s. When a server answers, go on with train(resume_from_checkpoint=True).",
                    os.path.join(cast("str", self.args.output_dir), f"checkpoint-{self.state.global_step}"),
                )
            raise

    def _disk_synced_generation(self, engine: VLLMServerEngine) -> DiskSyncedGeneration:
        return DiskSyncedGeneration(
            engine=engine,
            folder=self.args.weight_sync_dir or os.path.join(cast("str", self.args.output_dir), "weight_sync"),
            generate_together=not self.tools,
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
        )

    def _sync_weights(self) -> None:
        """Give the servers the policy's weights if it has moved, as TRL's `_generate_single_turn` does."""
        if self.state.global_step != self._last_loaded_step:
            # TRL's first process sends the weights and asks for completions, one after the other. Here each process
            # asks for its own, and must not before all is sent: a forward pass with half of it ends the server.
            with failing_together():
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        every, last, step = self.args.weight_sync_check_every, self._weights_checked_at, self.state.global_step
        due = every > 0 and (last is None or step - last >= every)
        # TRL has computed the policy's own log-probabilities where it corrects for the server's.
        if self._server_engine is not None and due and "old_per_token_logps" in output:
            self._weights_checked_at = step
            with failing_together():
                check_log_probabilities(
                    output["sampling_per_token_logps"],
                    output["old_per_token_logps"],
                    output["completion_mask"],
                    support_is_whole=self.top_p == 1.0 and not self.top_k and not self.min_p,
                    tolerance=0.01 if self.model.dtype == torch.float32 else 0.1,
                    tied_embeddings=bool(getattr(self.model.config, "tie_word_embeddings", False)),
                    urls=self.args.server_urls(),
                )
        return output
