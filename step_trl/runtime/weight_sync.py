"""
Send the policy's weights to vLLM servers that NCCL does not reach, through a folder that both sides see.

TRL's trainers call `VLLMGeneration`, which collects the parameters from any wrapper (FSDP, ZeRO-3, LoRA merged on the
way). [`DiskSyncedGeneration`] is a subclass that saves them instead of sending them.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from ..files import atomic_write
from ..rollout.dynamic import DynamicTruncatedRollout
from ..rollout.engines import PromptImages, VLLMServerEngine
from ..rollout.event_loop import run_to_end
from ..rollout.records import SamplingParams
from .ranks import failing_together


class WeightSyncError(RuntimeError):
    """Raised when servers and policy have different weights."""


class DiskSyncedGeneration(VLLMGeneration):
    """
    TRL's server mode without a process group: weights are sent over the disk, and completions over HTTP.

    The main process and every server see `folder` under the same path. `generate_together` says that all processes
    call `generate` equally often, so that an error in one can end the call in all. With tools, they do not.
    """

    def __init__(self, *, engine: VLLMServerEngine, folder: str | Path, generate_together: bool = True, **kwargs: Any):
        self.engine = engine
        self.generate_together = generate_together
        self.folder = Path(folder).resolve()
        super().__init__(mode="server", **kwargs)

    @classmethod
    def of(cls, trainer: GRPOTrainer, **kwargs: Any) -> DiskSyncedGeneration:
        """Return the generation of a trainer's model with its sampling parameters. `kwargs` are further arguments."""
        names = ("model", "accelerator", "processing_class", "temperature", "top_p", "top_k", "min_p")
        own = {name: getattr(trainer, name) for name in (*names, "max_completion_length")}
        return cls(**own, **kwargs)

    def _init_vllm(self) -> None:
        """Do nothing: there is no client and no communicator to set up."""

    def sync_weights(self) -> None:
        """
        Save the policy, load it on every server, reset their prefix caches, and remove the previous checkpoint.

        A reader never sees half a checkpoint, as it is written elsewhere and renamed. Every process must call this, as
        gathering parameters is collective. It returns when the servers have the weights, or raises on every process.
        """
        main = self.accelerator.is_main_process
        weights = {}
        for name, parameter in self._iter_named_params():
            if main:
                weights[name] = parameter.detach().to("cpu", copy=True)
        with failing_together():  # the other processes wait for the outcome
            if main:
                self._hand_over(weights)

    def _hand_over(self, weights: dict[str, torch.Tensor]) -> None:
        earlier = sorted(self.folder.glob("weights-*"))
        current = self.folder / f"weights-{uuid.uuid4().hex}"
        with atomic_write(current) as partial:
            partial.mkdir()
            save_torch_state_dict(weights, partial)
            self.model.config.save_pretrained(partial)
        run_to_end(self.engine.load_weights(current))
        for folder in earlier:
            shutil.rmtree(folder)

    def generate(self, prompts, images, num_generations, profiler=None) -> tuple:
        """Generate plain completions, in the format of TRL's method. Each process requests its own."""
        if images is not None:
            asked = self.engine.with_images(prompts, PromptImages.of(self.processing_class, images, {}))
        else:
            asked = prompts
        sampling = SamplingParams(
            self.max_completion_length, self.temperature, self.top_p, self.top_k or 0, self.min_p or 0.0
        )
        with failing_together() if self.generate_together else nullcontext():
            rollouts = DynamicTruncatedRollout(self.engine, [], sampling).run(asked)
        logprobs = [[[logprob] for logprob in rollout.logprobs] for rollout in rollouts]
        return prompts, [rollout.completion_ids for rollout in rollouts], logprobs, None


def check_log_probabilities(
    sampled: torch.Tensor,
    policy: torch.Tensor,
    mask: torch.Tensor,
    *,
    support_is_whole: bool,
    tolerance: float,
    tied_embeddings: bool,
    urls: Sequence[str],
) -> None:
    """
    Compare the servers' log-probabilities `(B, T)`, NaN where nothing was sampled, with the policy's own.

    Both are at the same temperature, and `mask` is 0 for padding. Without `support_is_whole`, tokens were sampled with
    top-p, top-k or min-p, which only raise log-probabilities, so that only lower ones count as a difference. A mean
    difference of more than `tolerance` nats raises [`WeightSyncError`]. The other arguments are for its message.
    """
    counted = mask.bool() & ~sampled.isnan()
    if not counted.any():
        return
    difference = (policy - sampled)[counted]
    difference = difference.abs() if support_is_whole else difference.clamp(min=0)
    mean = difference.mean().item()
    if mean > tolerance:
        cause = (
            "The model ties its embeddings, and vLLM's CPU server keeps the old lm_head of such a model when it "
            "reloads weights: set tie_word_embeddings=False in the model's config before training, or serve on a GPU."
            if tied_embeddings
            else "Check that the servers read weight_sync_dir under the same path, serve the model that is trained, "
            "and run with --logprobs-mode processed_logprobs."
        )
        raise WeightSyncError(
            f"weight_sync: after a synchronisation, log-probabilities of {', '.join(urls)} differ from the policy's "
            f"by {mean:.3f} on average (tolerance {tolerance}), so the servers have other weights. {cause}"
        )
